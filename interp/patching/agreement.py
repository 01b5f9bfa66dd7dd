"""How well an estimate matches exact effects: correlations and recall of the largest, over all cells and by layer.

One number for a whole map can be carried by a single cell, such as the MLP of layer 0 at the token that was changed. So
rank correlation and recall stand beside Pearson's, each layer has its own row, and one row leaves layer 0 out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy import stats

_BUDGET = 4_000_000  # resampled cells held at once (32 MB of float64)


def agreement(
    estimate: xr.DataArray | Mapping[str, xr.DataArray] | Sequence[xr.DataArray],
    exact: xr.DataArray | Mapping[str, xr.DataArray] | Sequence[xr.DataArray],
    *,
    top_k: Sequence[int] = (10, 20, 50),
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Pearson, Spearman and top-k recall of an estimate against exact effects.

    Prompts are averaged first. If both arrays keep a `prompt` axis, each number comes with its bootstrap interval over
    prompts (the same draws for both). Unsigned estimates (AtP*, NormGrad) are held against magnitudes.

    Args:
        estimate: scores with the dims of `exact`; or several, by the name of the site or one after another.
        exact: effects of `activation_patching`; or as many as estimates.
        top_k: for each k, the share of the k largest effects (by magnitude; effects of exactly 0 are never among them)
            that are among the k largest scores.
        level: share of the bootstrap distribution inside an interval.
        n_resamples: bootstrap samples; 0: no intervals.
        seed: of the draws.

    Returns:
        One row for "all" cells, "without layer 0" and each layer (if there is a layer axis), below the name of the site
        if several were given. Columns: n_cells; pearson, spearman, recall_10, ..., each followed by its _low and _high.
        NaN where a number is undefined: fewer than three cells or no variation (correlations), no more than k cells
        (recall), no intervals without prompts.

    Raises:
        ValueError: if the arrays cover different cells or different prompts.
    """
    if isinstance(estimate, xr.DataArray) != isinstance(exact, xr.DataArray):
        raise ValueError("give one estimate and one array of exact effects, or several of both")
    if isinstance(estimate, xr.DataArray) and isinstance(exact, xr.DataArray):
        return _table(estimate, exact, top_k, level, n_resamples, seed)
    estimates, exacts = _by_name(estimate), _by_name(exact)
    if list(estimates) != list(exacts):
        raise ValueError(f"estimates are of {', '.join(estimates)}, exact effects of {', '.join(exacts)}")
    tables = {name: _table(one, exacts[name], top_k, level, n_resamples, seed) for name, one in estimates.items()}
    return pd.concat(tables, names=["site"])


def _by_name(arrays: xr.DataArray | Mapping[str, xr.DataArray] | Sequence[xr.DataArray]) -> dict[str, xr.DataArray]:
    if isinstance(arrays, Mapping):
        return dict(arrays)
    return {str(one.attrs.get("site", place)): one for place, one in enumerate(arrays)}


def _table(
    estimate: xr.DataArray, exact: xr.DataArray, top_k: Sequence[int], level: float, n_resamples: int, seed: int
) -> pd.DataFrame:
    scores, effects = paired(estimate, exact)
    has_prompts = "prompt" in scores.dims and "prompt" in effects.dims
    row_masks = _rows(scores)
    flat_scores, flat_effects = (_flat(one) for one in (scores, effects))
    means = flat_scores.mean(0), flat_effects.mean(0)
    defined = np.isfinite(means[0]) & np.isfinite(means[1])
    rows = {name: mask & defined for name, mask in row_masks.items()}
    points = {name: measures(means[0][None, mask], means[1][None, mask], top_k) for name, mask in rows.items()}
    samples: dict[str, dict[str, ndarray]] = {}
    if has_prompts and len(flat_scores) > 1 and n_resamples:
        samples = _resampled(flat_scores, flat_effects, rows, top_k, n_resamples, seed)
    records = {}
    for name, mask in rows.items():
        record: dict[str, float] = {"n_cells": int(mask.sum())}
        for measure, value in points[name].items():
            low, high = _interval(samples[name][measure], level) if samples else (np.nan, np.nan)
            record |= {measure: float(value[0]), f"{measure}_low": low, f"{measure}_high": high}
        records[name] = record
    return pd.DataFrame.from_dict(records, orient="index").rename_axis("cells").astype({"n_cells": int})


def paired(estimate: xr.DataArray, exact: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Both arrays over the same cells in the same order; magnitudes of the effects if the estimate has no sign.

    Raises:
        ValueError: if they cover different cells or prompts.
    """
    cells = [dim for dim in exact.dims if dim != "prompt"]
    if set(cells) != set(estimate.dims) - {"prompt"}:
        raise ValueError(f"the estimate has the axes {estimate.dims}, the exact effects {exact.dims}")
    if estimate.attrs.get("unsigned", 0):
        exact = abs(exact)
    try:
        estimate, exact = xr.align(estimate, exact, join="exact")
    except ValueError as error:
        raise ValueError(f"estimate and exact effects are not of the same cells and prompts: {error}") from None
    return estimate.transpose("prompt", *cells, missing_dims="ignore"), exact.transpose(
        "prompt", *cells, missing_dims="ignore"
    )


def _flat(array: xr.DataArray) -> Float[ndarray, "prompt cell"]:
    values = np.asarray(array.values, dtype=np.float64)
    return values.reshape(len(values) if "prompt" in array.dims else 1, -1)


def _rows(scores: xr.DataArray) -> dict[str, Bool[ndarray, " cell"]]:
    """Which cells each row of the table is about."""
    cells = scores.isel(prompt=0) if "prompt" in scores.dims else scores
    rows = {"all": np.ones(cells.size, dtype=bool)}
    if "layer" in cells.dims:
        layer = np.broadcast_to(
            cells["layer"].values.reshape([-1 if dim == "layer" else 1 for dim in cells.dims]), cells.shape
        ).ravel()
        if 0 in layer:
            rows["without layer 0"] = layer != 0
        rows |= {f"layer {one}": layer == one for one in cells["layer"].values}
    return rows


def measures(
    scores: Float[ndarray, "row cell"], effects: Float[ndarray, "row cell"], top_k: Sequence[int]
) -> dict[str, Float[ndarray, " row"]]:
    """Each measure of agreement, for every row by itself; NaN where it is undefined."""
    found = {
        "pearson": _correlation(scores, effects),
        "spearman": _correlation(*(stats.rankdata(one, axis=-1).reshape(one.shape) for one in (scores, effects))),
    }
    if top_k:
        ranks = _descending_ranks(np.abs(scores)), _descending_ranks(np.abs(effects))
        found |= {f"recall_{k}": _recall(*ranks, effects, k) for k in top_k}
    return found


def _correlation(x: Float[ndarray, "row cell"], y: Float[ndarray, "row cell"]) -> Float[ndarray, " row"]:
    result = np.full(len(x), np.nan)
    if x.shape[1] < 3:
        return result
    varies = (np.ptp(x, axis=1) > 0) & (np.ptp(y, axis=1) > 0)
    x, y = (one[varies] - one[varies].mean(axis=1, keepdims=True) for one in (x, y))
    # Scaled first, so that products of tiny numbers do not vanish.
    x, y = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (x, y))
    result[varies] = np.clip((x * y).sum(axis=1), -1, 1)
    return result


def _descending_ranks(values: Float[ndarray, "row cell"]) -> ndarray:
    order = np.argsort(-values, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(values.shape[1])[None], axis=1)
    return ranks


def _recall(
    score_ranks: ndarray, effect_ranks: ndarray, effects: Float[ndarray, "row cell"], k: int
) -> Float[ndarray, " row"]:
    if k >= effects.shape[1]:
        return np.full(len(effects), np.nan)
    largest = (effect_ranks < k) & (effects != 0)
    n_largest = largest.sum(axis=1)
    found = (largest & (score_ranks < n_largest[:, None])).sum(axis=1)
    return np.where(n_largest > 0, found / np.maximum(n_largest, 1), np.nan)


def _resampled(
    scores: Float[ndarray, "prompt cell"],
    effects: Float[ndarray, "prompt cell"],
    rows: Mapping[str, Bool[ndarray, " cell"]],
    top_k: Sequence[int],
    n_resamples: int,
    seed: int,
) -> dict[str, dict[str, ndarray]]:
    """Every measure of every row of the table for each bootstrap sample of prompts."""
    n_prompts, n_cells = scores.shape
    draws = np.random.default_rng(seed).multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=n_resamples)
    parts: dict[str, list[dict[str, ndarray]]] = {name: [] for name in rows}
    for some in _chunks(draws / n_prompts, max(1, _BUDGET // n_cells)):
        resampled = some @ scores, some @ effects
        for name, mask in rows.items():
            parts[name].append(measures(resampled[0][:, mask], resampled[1][:, mask], top_k))
    return {
        name: {measure: np.concatenate([one[measure] for one in found]) for measure in found[0]}
        for name, found in parts.items()
    }


def _chunks(rows: ndarray, size: int) -> Iterator[ndarray]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _interval(values: Float[ndarray, " sample"], level: float) -> tuple[float, float]:
    """Percentile interval; NaN if the measure is undefined in a sample."""
    if np.isnan(values).any():
        return np.nan, np.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
