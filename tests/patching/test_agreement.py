"""Agreement against scipy, recall by hand, and bootstrap intervals against resampling one by one."""

import sys

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from interp.patching.agreement import agreement, measures

LAYERS, POSITIONS, PROMPTS = 4, 6, 12


def maps(seed=0, prompts=PROMPTS, noise=0.7, layers=range(LAYERS), **attrs):
    generator = np.random.default_rng(seed)
    layers = list(layers)
    exact = generator.normal(size=(prompts, len(layers), POSITIONS)) + 3 * generator.normal(
        size=(len(layers), POSITIONS)
    )
    estimate = exact + noise * generator.normal(size=exact.shape) + generator.normal(size=exact.shape[1:])
    coords = {"prompt": range(prompts), "layer": layers, "position": range(POSITIONS)}
    dims = ("prompt", "layer", "position")
    return xr.DataArray(estimate, dims=dims, coords=coords, attrs=attrs), xr.DataArray(exact, dims=dims, coords=coords)


def test_correlations_are_those_of_scipy_for_all_rows():
    estimate, exact = maps()
    table = agreement(estimate, exact, top_k=())
    assert list(table.index) == ["all", "without layer 0", *(f"layer {layer}" for layer in range(LAYERS))]
    means = estimate.mean("prompt"), exact.mean("prompt")
    for name, part in [
        ("all", slice(None)),
        ("without layer 0", slice(1, None)),
        *((f"layer {layer}", [layer]) for layer in range(LAYERS)),
    ]:
        x, y = (one.isel(layer=part).values.ravel() for one in means)
        assert table.loc[name, "n_cells"] == len(x)
        np.testing.assert_allclose(table.loc[name, "pearson"], stats.pearsonr(x, y).statistic, rtol=1e-12)
        np.testing.assert_allclose(table.loc[name, "spearman"], stats.spearmanr(x, y).statistic, rtol=1e-12)


def test_spearman_shares_ranks_between_ties():
    x, y = np.array([[1.0, 2, 2, 3, 3, 3, 0]]), np.array([[5.0, 5, 1, 1, 2, 9, 9]])
    found = measures(x, y, ())["spearman"][0]
    np.testing.assert_allclose(found, stats.spearmanr(x[0], y[0]).statistic, rtol=1e-12)


def test_recall_is_the_share_of_the_largest_effects_among_the_largest_scores():
    effects = np.array([[9.0, -8, 7, 1, 0.5, 0, 0, 0, 0, 0]])
    scores = np.array([[1.0, -9, 0, 8, 7, 0, 0, 0, 0.1, 0]])
    found = measures(scores, effects, (1, 3, 6, 10))
    assert found["recall_1"][0] == 0
    np.testing.assert_allclose(found["recall_3"][0], 1 / 3)  # 8, of 9, 8 and 7
    np.testing.assert_allclose(found["recall_6"][0], 4 / 5)  # only five effects are not 0
    assert np.isnan(found["recall_10"][0])
    assert np.isnan(measures(scores, effects * 0, (3,))["recall_3"][0])


def test_one_cell_can_carry_a_pearson_and_the_table_shows_it():
    estimate, exact = maps(noise=0)
    generator = np.random.default_rng(1)
    estimate = estimate.copy(data=generator.normal(size=estimate.shape))
    for one in (estimate, exact):
        one[:, 0, 3] = 1000
    table = agreement(estimate, exact, top_k=(), n_resamples=0)
    assert table.loc["all", "pearson"] > 0.99
    assert abs(table.loc["without layer 0", "pearson"]) < 0.7
    assert abs(table.loc["all", "spearman"]) < 0.7


def test_intervals_are_the_percentiles_of_tables_of_resampled_prompts():
    estimate, exact = maps()
    n_resamples, seed = 60, 4
    table = agreement(estimate, exact, top_k=(5,), n_resamples=n_resamples, seed=seed, level=0.9)
    draws = np.random.default_rng(seed).multinomial(PROMPTS, np.full(PROMPTS, 1 / PROMPTS), size=n_resamples)
    samples = []
    for draw in draws:
        rows = np.repeat(np.arange(PROMPTS), draw)
        chosen = (one.isel(prompt=rows).drop_vars("prompt") for one in (estimate, exact))
        samples.append(agreement(*(one.mean("prompt") for one in chosen), top_k=(5,)))
    for measure in ("pearson", "spearman", "recall_5"):
        for row in table.index:
            values = [sample.loc[row, measure] for sample in samples]
            low, high = np.quantile(values, [0.05, 0.95])
            np.testing.assert_allclose(table.loc[row, [f"{measure}_low", f"{measure}_high"]], [low, high], rtol=1e-9)


def test_intervals_do_not_depend_on_how_much_is_held_at_once(monkeypatch):
    estimate, exact = maps()
    whole = agreement(estimate, exact, n_resamples=50)
    monkeypatch.setattr(sys.modules[measures.__module__], "_BUDGET", 100)
    np.testing.assert_allclose(agreement(estimate, exact, n_resamples=50), whole, rtol=1e-12)


def test_without_prompts_in_both_there_are_no_intervals():
    estimate, exact = maps()
    full = agreement(estimate, exact, n_resamples=20)
    for pair in [(estimate.mean("prompt"), exact), (estimate, exact.mean("prompt"))]:
        table = agreement(*pair, n_resamples=20)
        np.testing.assert_allclose(table["pearson"], full["pearson"])
        assert table[["pearson_low", "pearson_high", "recall_10_low"]].isna().all(axis=None)
    alone = agreement(estimate.isel(prompt=[0]), exact.isel(prompt=[0]))
    assert alone["pearson_low"].isna().all()
    assert agreement(estimate, exact, n_resamples=0)["pearson_low"].isna().all()


def test_what_is_undefined_is_nan():
    estimate, exact = maps()
    table = agreement(estimate * 0, exact, top_k=(10, 50), n_resamples=10)
    assert table[["pearson", "spearman", "pearson_low"]].isna().all(axis=None)
    assert np.isnan(table.loc["all", "recall_50"])
    assert np.isnan(table.loc["layer 1", "recall_10"])
    one_cell = agreement(estimate.isel(position=[0]), exact.isel(position=[0]), top_k=(1,), n_resamples=10)
    assert one_cell.loc["layer 1", ["pearson", "recall_1"]].isna().all()
    assert one_cell.loc["all", "n_cells"] == LAYERS
    two_cells = agreement(estimate.isel(position=[0, 1]), exact.isel(position=[0, 1]), n_resamples=10)
    assert two_cells.loc["layer 1", ["pearson", "spearman"]].isna().all()


def test_undefined_cells_are_left_out():
    estimate, exact = maps()
    holes = exact.copy()
    holes[:, 2, :] = np.nan
    table = agreement(estimate, holes, top_k=(5,), n_resamples=10)
    assert table.loc["all", "n_cells"] == (LAYERS - 1) * POSITIONS
    assert table.loc["layer 2", "n_cells"] == 0
    kept = [0, 1, 3]
    expected = agreement(estimate.isel(layer=kept), exact.isel(layer=kept), top_k=(5,), n_resamples=10)
    np.testing.assert_allclose(table.loc["all"], expected.loc["all"])
    assert np.isnan(table.loc["layer 2", "pearson"])


def test_axes_in_another_order_and_maps_without_layers():
    estimate, exact = maps()
    turned = agreement(estimate.transpose("position", "layer", "prompt"), exact, n_resamples=20)
    np.testing.assert_allclose(turned, agreement(estimate, exact, n_resamples=20))
    flat = agreement(estimate.isel(layer=0, drop=True), exact.isel(layer=0, drop=True))
    assert list(flat.index) == ["all"]
    later = agreement(*maps(layers=[3, 5]))
    assert list(later.index) == ["all", "layer 3", "layer 5"]


def test_unsigned_estimates_are_held_against_magnitudes():
    estimate, exact = maps(unsigned=1)
    estimate = abs(estimate).assign_attrs(estimate.attrs)
    table = agreement(estimate, exact, top_k=())
    x, y = estimate.mean("prompt").values.ravel(), abs(exact).mean("prompt").values.ravel()
    np.testing.assert_allclose(table.loc["all", "pearson"], stats.pearsonr(x, y).statistic)


def test_several_sites_at_once():
    estimate, exact = maps()
    by_name = agreement({"z": estimate, "mlp_out": -estimate}, {"z": exact, "mlp_out": exact}, n_resamples=20)
    assert by_name.index.names == ["site", "cells"]
    np.testing.assert_allclose(by_name.loc["z"], agreement(estimate, exact, n_resamples=20))
    np.testing.assert_allclose(by_name.loc[("mlp_out", "all"), "pearson"], -by_name.loc[("z", "all"), "pearson"])
    in_a_row = agreement(
        [estimate.assign_attrs(site="z"), -estimate.assign_attrs(site="v")],
        [exact.assign_attrs(site="z"), exact.assign_attrs(site="v")],
        n_resamples=20,
    )
    np.testing.assert_allclose(in_a_row.loc["z"], by_name.loc["z"])


def test_maps_of_different_cells_are_refused():
    estimate, exact = maps()
    with pytest.raises(ValueError, match="not of the same cells"):
        agreement(estimate.isel(layer=slice(1, None)), exact)
    with pytest.raises(ValueError, match="has the axes"):
        agreement(estimate.rename(position="head"), exact)
    with pytest.raises(ValueError, match="estimates are of z, exact effects of v"):
        agreement({"z": estimate}, {"v": exact})
    with pytest.raises(ValueError, match="several of both"):
        agreement({"z": estimate}, exact)
