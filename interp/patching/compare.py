"""Estimates beside exact effects: every method at every site on one task, and how well they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import xarray as xr

from interp.metrics import Metric
from interp.model import Model
from interp.patching.activation import Direction, activation_patching
from interp.patching.agreement import agreement
from interp.patching.cells import Axis
from interp.patching.methods import estimates, method_named
from interp.tasks import Task

EXACT = "exact"
"""How exact effects are called among the methods."""


def compare(
    model: Model,
    task: Task,
    *,
    methods: Sequence[str] = ("atp", "relp", "secant"),
    sites: Sequence[str] = ("resid_pre", "attn_out", "mlp_out"),
    by: Sequence[Axis] = ("layer", "position"),
    direction: Direction = "denoise",
    metric: str | Metric | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> dict[str, xr.DataArray]:
    """Exact effects and estimates of every cell, prompt by prompt.

    Costs a whole sweep a site; the estimates are a few forward and backward passes each.

    Args:
        model: the model.
        task: clean and corrupted prompts with answers.
        methods: names in `METHODS`.
        sites: kinds of site, all with the axes in `by`.
        by: the axes kept.
        direction: as in `activation_patching`.
        metric: as in `activation_patching`; it needs a gradient.
        batch_size: as in `activation_patching`.
        progress: show progress bars; None: in a terminal or notebook only.

    Returns:
        By site, [estimate, prompt, ...], the first being "exact"; the attr `seconds` says what each took. (The axis is
        not called "method": `sel` of xarray has an argument of that name.)

    Raises:
        ValueError: for an unknown method, site or axis.
    """
    for method in methods:
        method_named(method)
    estimated = {
        method: estimates(
            model,
            task,
            sites=sites,
            method=method,
            by=by,
            direction=direction,
            metric=metric,
            per_prompt=True,
            batch_size=batch_size,
            progress=progress,
        )
        for method in methods
    }
    found = {}
    for site in sites:
        exact = activation_patching(
            model,
            task,
            site=site,
            by=by,
            direction=direction,
            metric=metric,
            per_prompt=True,
            batch_size=batch_size,
            progress=progress,
        )
        arrays = {EXACT: exact, **{method: estimated[method][site] for method in methods}}
        both = xr.concat(
            list(arrays.values()), dim=pd.Index(list(arrays), name="estimate"), coords="minimal", compat="override"
        )
        unsigned = [method for method, one in arrays.items() if one.attrs.get("unsigned", 0)]
        seconds = [float(one.attrs["seconds"]) for one in arrays.values()]
        found[site] = both.assign_attrs({**exact.attrs, "unsigned": ", ".join(unsigned), "seconds": seconds})
    return found


def agreement_by_method(
    compared: Mapping[str, xr.DataArray], *, top_k: Sequence[int] = (10, 20, 50), n_resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """`agreement` of every method with the exact effects at every site.

    Args:
        compared: what `compare` returns.
        top_k: as in `agreement`.
        n_resamples: as in `agreement`.
        seed: as in `agreement`.

    Returns:
        One row for each method, site and group of cells.
    """
    tables = {}
    for site, arrays in compared.items():
        unsigned = str(arrays.attrs["unsigned"]).split(", ")
        for method in [str(one) for one in arrays["estimate"].values if one != EXACT]:
            scores = arrays.sel(estimate=method, drop=True).assign_attrs(unsigned=int(method in unsigned))
            tables[method, site] = agreement(
                scores, arrays.sel(estimate=EXACT, drop=True), top_k=top_k, n_resamples=n_resamples, seed=seed
            )
    return pd.concat(tables, names=["method", "site"]).sort_index(level=["method", "site"], sort_remaining=False)
