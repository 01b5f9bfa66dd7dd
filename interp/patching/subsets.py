"""What an estimate may have missed: random subsets of the cells not verified, patched together.

A cell that matters shows in the subsets that hold it. For each cell the exact effects of subsets with it and without it
are compared, which bounds its effect from above as far as it acts in company as it does alone. Far fewer runs than one
a cell, since each run says something about half of them.

Source: the subset diagnostics of AtP* (Kramár et al. 2024, arXiv 2403.00745).
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy import stats

from interp.metrics import Metric
from interp.model import Model
from interp.patching.verify import joint_effects, request_of
from interp.tasks import Task


def subset_bounds(
    model: Model,
    task: Task,
    estimate: xr.DataArray,
    *,
    verified: int = 0,
    share: float = 0.5,
    n_subsets: int = 200,
    level: float = 0.95,
    seed: int = 0,
    metric: Metric | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Upper bounds on the effects of the cells that an estimate ranks low, from random subsets of them.

    Each subset takes every such cell with probability `share` and is patched together, exactly, in every prompt. The
    mean effect of the subsets with a cell, less that of the subsets without it, estimates the cell's effect in such
    company; its one-sided Welch interval is the bound. That is the cell's own effect only as far as cells do not
    interact: redundant ones (a backup for another) or ones that need each other are mistaken by it.

    Costs n_subsets runs a prompt.

    Args:
        model: the model that the estimate was made on.
        task: the task that it was made on.
        estimate: what an estimate of this package returned.
        verified: how many cells of largest magnitude are known exactly and left out of all subsets.
        share: probability with which a subset holds a cell; smaller ones interact less and say less.
        n_subsets: random subsets.
        level: confidence that the effect of a cell does not exceed its bound.
        seed: of the subsets.
        metric: the metric, if it was a function of your own.
        batch_size: variants at once; by default what memory allows.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset with the axes of the estimate, NaN at cells left out: `effect` (the difference of means, signed) and
        `bound` (on its magnitude). The attr `bound` is the largest: with confidence `level`, no cell outside the
        verified ones has a larger effect. (No correction for the number of cells: that some cell exceeds the bound is
        rejected only if it is rejected for each.)

    Raises:
        ValueError: if no cell is left, or subsets are too few to compare.
    """
    if not 0 < share < 1 or not 0.5 <= level < 1 or n_subsets < 4:
        raise ValueError(
            f"share={share}, level={level}, n_subsets={n_subsets}: a share lies between 0 and 1, a level between 0.5 "
            "and 1, and at least 4 subsets can be compared"
        )
    asked = request_of(model, task, estimate, metric, batch_size, progress)
    estimate = estimate.transpose("prompt", *asked.axes, missing_dims="ignore")
    scores = estimate.mean("prompt") if "prompt" in estimate.dims else estimate
    order = np.argsort(-np.abs(scores.values), axis=None, kind="stable")
    cells = np.sort(order[verified:])
    if not len(cells):
        raise ValueError(f"verified={verified} leaves none of the {scores.size} cells")
    chosen = np.random.default_rng(seed).random((n_subsets, len(cells))) < share
    places = [tuple(map(int, np.unravel_index(cell, scores.shape))) for cell in cells]
    subsets = [[places[one] for one in np.flatnonzero(row)] for row in chosen]
    effects = joint_effects(asked, estimate.attrs["site"], subsets).double().mean(0).numpy()
    found = {"effect": np.full(scores.size, np.nan), "bound": np.full(scores.size, np.nan)}
    found["effect"][cells], found["bound"][cells] = _compared(effects, chosen, level)
    return xr.Dataset(
        {name: (scores.dims, values.reshape(scores.shape)) for name, values in found.items()},
        coords={name: one for name, one in scores.coords.items() if name != "exact"},
        attrs={
            **{key: estimate.attrs[key] for key in ("site", "direction", "metric", "normalised")},
            "estimate": estimate.attrs.get("method", ""),
            "verified": verified,
            "n_subsets": n_subsets,
            "share": share,
            "level": level,
            "seed": seed,
            "bound": float(found["bound"][cells].max()),
        },
    )


def _compared(
    effects: Float[ndarray, " subset"], chosen: Bool[ndarray, "subset cell"], level: float
) -> tuple[Float[ndarray, " cell"], Float[ndarray, " cell"]]:
    """(Mean effect of the subsets with a cell less that of those without, the bound on its magnitude), cell by cell.

    Raises:
        ValueError: if fewer than two subsets hold a cell, or fewer than two do not.
    """
    n_with = chosen.sum(0)
    n_without = len(chosen) - n_with
    if min(n_with.min(), n_without.min()) < 2:
        raise ValueError("some cell is in fewer than two subsets, or missing from fewer than two: take more n_subsets")
    (mean_with, variance_with), (mean_without, variance_without) = (
        _moments(effects, which) for which in (chosen, ~chosen)
    )
    parts = variance_with / n_with, variance_without / n_without
    error = np.sqrt(parts[0] + parts[1])
    terms = parts[0] ** 2 / (n_with - 1) + parts[1] ** 2 / (n_without - 1)
    freedom = np.divide(error**4, terms, out=np.ones_like(terms), where=terms > 0)
    difference = mean_with - mean_without
    return difference, np.abs(difference) + stats.t.ppf(level, freedom) * error


def _moments(
    effects: Float[ndarray, " subset"], chosen: Bool[ndarray, "subset cell"]
) -> tuple[Float[ndarray, " cell"], Float[ndarray, " cell"]]:
    """Mean and variance of the effects of the chosen subsets, cell by cell."""
    count, middle = chosen.sum(0), effects.mean()
    # Centred first, so that the difference of squares loses nothing.
    centred = effects - middle
    mean = centred @ chosen / count
    squares = centred**2 @ chosen - count * mean**2
    return mean + middle, np.maximum(squares, 0) / (count - 1)
