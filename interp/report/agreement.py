"""How far measures of the same heads agree: correlations between every pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import xarray as xr
from scipy import stats

Correlation = Literal["pearson", "spearman"]

_CORRELATIONS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "pearson": lambda x, y: float(stats.pearsonr(x, y).statistic),
    "spearman": lambda x, y: float(stats.spearmanr(x, y).statistic),
}


def agreement_matrix(measures: Mapping[str, xr.DataArray], *, correlation: Correlation = "spearman") -> xr.DataArray:
    """Correlation of every pair of measures over the entries where both are defined.

    Args:
        measures: arrays of equal shape by name.
        correlation: "spearman" compares ranks; "pearson" values, and is led by the few largest.

    Returns:
        [measure, other]; NaN where fewer than three entries are shared or one measure is constant there.

    Raises:
        ValueError: if the shapes differ.
    """
    shapes = {name: values.shape for name, values in measures.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"measures of different shapes cannot be compared: {shapes}")
    names = list(measures)
    flat = [np.asarray(measures[name].values, dtype=float).ravel() for name in names]
    matrix = [[_correlate(one, other, _CORRELATIONS[correlation]) for other in flat] for one in flat]
    return xr.DataArray(
        np.array(matrix),
        dims=("measure", "other"),
        coords={"measure": names, "other": names},
        attrs={"correlation": correlation},
    )


def _correlate(x: np.ndarray, y: np.ndarray, correlation: Callable[[np.ndarray, np.ndarray], float]) -> float:
    shared = np.isfinite(x) & np.isfinite(y)
    if shared.sum() < 3 or np.ptp(x[shared]) == 0 or np.ptp(y[shared]) == 0:
        return float("nan")
    return correlation(x[shared], y[shared])
