"""Agreement between measures, against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from interp.report import agreement_matrix


def measure(*values):
    return xr.DataArray(np.array(values, dtype=float).reshape(2, -1), dims=("layer", "head"))


def test_matrix_is_that_of_scipy():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 12))
    measures = {"x": measure(*x), "y": measure(*y)}
    spearman = agreement_matrix(measures, correlation="spearman")
    assert float(spearman.sel(measure="x", other="y")) == pytest.approx(stats.spearmanr(x, y).statistic)
    pearson = agreement_matrix(measures, correlation="pearson")
    assert float(pearson.sel(measure="y", other="x")) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert np.diag(pearson) == pytest.approx(1)


def test_ranks_ignore_how_far_values_lie():
    measures = {"x": measure(1, 2, 3, 4), "y": measure(1, 10, 100, 1000)}
    assert float(agreement_matrix(measures, correlation="spearman")[0, 1]) == pytest.approx(1)
    assert float(agreement_matrix(measures, correlation="pearson")[0, 1]) < 0.9


def test_undefined_entries_are_left_out_of_a_pair():
    with_gap = agreement_matrix({"x": measure(1, 2, 3, np.nan), "y": measure(2, 4, 6, -100)}, correlation="pearson")
    assert float(with_gap[0, 1]) == pytest.approx(1)


def test_constant_or_too_few_gives_nan():
    assert np.isnan(agreement_matrix({"x": measure(1, 2, 3, 4), "y": measure(5, 5, 5, 5)})[0, 1])
    assert np.isnan(agreement_matrix({"x": measure(1, 2, np.nan, np.nan), "y": measure(1, 2, 3, 4)})[0, 1])


def test_shapes_must_match():
    with pytest.raises(ValueError, match="different shapes"):
        agreement_matrix({"x": measure(1, 2), "y": measure(1, 2, 3, 4)})
