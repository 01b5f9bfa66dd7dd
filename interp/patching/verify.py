"""Exact effects of chosen cells, to hold an estimate against: its top entries, or any others.

Every cell is a counterfactual run of the sweep engine on every prompt: k cells cost k runs a prompt, less what the
engine saves.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.metrics import METRICS, Metric
from interp.model import Edit, Model, Site
from interp.patching.agreement import measures
from interp.patching.batching import batches
from interp.patching.cells import AXES, cell_edit
from interp.patching.estimate import Request, normalised_scores, request
from interp.patching.reading import reading
from interp.patching.sweep import sweep
from interp.patching.variant import Variant
from interp.tasks import Task

Place = tuple[int, ...]
"""Where a cell is along each axis kept, in the order of the axes."""


def verify_top(
    model: Model,
    task: Task,
    estimate: xr.DataArray,
    k: int,
    *,
    metric: Metric | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """The estimate with the exact effects of its k largest entries beside it.

    The largest by magnitude of the mean over prompts; each is run exactly on every prompt.

    Args:
        model: the model that the estimate was made on.
        task: the task that it was made on.
        estimate: what an estimate of this package returned.
        k: how many entries; all, if there are fewer.
        metric: the metric, if it was a function of your own.
        batch_size: variants at once; by default what memory allows.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        A copy with the coordinate `exact` (NaN where nothing was run) and, over the entries run, the attrs
        `verify_pearson`, `verify_spearman`, `verify_sign_agreement` (share of entries with the right sign; NaN for an
        unsigned estimate), `verify_largest_error`; and `verify_k`, `verify_seconds`.

    Raises:
        ValueError: if k is less than 1, or the estimate is not of this task or of an unknown metric.
    """
    asked = request_of(model, task, estimate, metric, batch_size, progress)
    return _with_exact(asked, estimate, k)


def verified_top(asked: Request, estimates: Mapping[str, xr.DataArray], k: int | None) -> dict[str, xr.DataArray]:
    """`verify_top` of what an estimate found on a request; as they are for k = None."""
    return {name: one if k is None else _with_exact(asked, one, k) for name, one in estimates.items()}


def verified(estimate: xr.DataArray) -> xr.Dataset:
    """The entries that were run exactly, largest first: `estimate`, `exact` and `error` side by side.

    Args:
        estimate: with a coordinate `exact`, as `verify=k` or `verify_top` make it.

    Returns:
        Dataset over `cell` (and `prompt`), with the place of each cell as coordinates. The error is estimate − exact.

    Raises:
        ValueError: if nothing of it was run exactly.
    """
    if "exact" not in estimate.coords:
        raise ValueError("nothing of this estimate was run exactly: ask for verify=k, or call verify_top")
    axes = [str(dim) for dim in estimate.dims if dim != "prompt"]
    table = xr.Dataset({"estimate": estimate.drop_vars("exact"), "exact": estimate["exact"].drop_vars("exact")})
    table = table.expand_dims("everything") if not axes else table
    table = table.stack(cell=axes or ["everything"], create_index=False).dropna("cell", subset=["exact"])
    size = abs(table["estimate"].mean("prompt") if "prompt" in table.dims else table["estimate"])
    table = table.isel(cell=np.argsort(-size.values, kind="stable"))
    return table.assign(error=table["estimate"] - table["exact"]).assign_attrs(estimate.attrs)


def exact_cells(
    model: Model,
    task: Task,
    estimate: xr.DataArray,
    cells: Sequence[Mapping[str, int]],
    *,
    metric: Metric | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Exact effects of chosen cells of an estimate, in its direction, metric and scale.

    Args:
        model: the model that the estimate was made on.
        task: the task that it was made on.
        estimate: what an estimate of this package returned; only its axes and attrs are used.
        cells: for each cell, the coordinate along every axis: `{"layer": 5, "head": 1}`.
        metric: as in `verify_top`.
        batch_size: variants at once; by default what memory allows.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        [prompt, cell], with the place of each cell as coordinates.

    Raises:
        ValueError: for a cell that the estimate does not have.
    """
    asked = request_of(model, task, estimate, metric, batch_size, progress)
    for cell in cells:
        if set(cell) != set(asked.axes):
            raise ValueError(f"the cell {dict(cell)} names other axes than the estimate's: {', '.join(asked.axes)}")
    indexes = {axis: estimate.indexes[axis] for axis in asked.axes}
    for axis, index in indexes.items():
        for cell in cells:
            if cell[axis] not in index:
                raise ValueError(f"{axis} {cell[axis]} is not in the estimate; it runs {index[0]}..{index[-1]}")
    places = [tuple(int(indexes[axis].get_loc(cell[axis])) for axis in asked.axes) for cell in cells]
    effects = joint_effects(asked, estimate.attrs["site"], [[place] for place in places])
    return xr.DataArray(
        effects.numpy(),
        dims=("prompt", "cell"),
        coords={axis: ("cell", [cell[axis] for cell in cells]) for axis in asked.axes},
        name="exact",
        attrs={key: estimate.attrs[key] for key in ("site", "direction", "metric", "normalised")},
    )


def joint_effects(asked: Request, name: str, subsets: Sequence[Sequence[Place]]) -> Float[Tensor, "prompt subset"]:
    """Exact effect of patching several cells together, for each subset of them; normalised if that was asked for.

    Args:
        asked: the call's choices.
        name: which of its sites.
        subsets: the cells of each run.
    """
    sites = _sites_patched(asked, name, subsets)
    groups = asked.task.by_length()
    found = [_effects_on(asked, group, sites, subsets) for group in groups]
    order = torch.cat([group.index for group in groups]).argsort()
    effects, clean, corrupted = (torch.cat(parts)[order] for parts in zip(*found, strict=True))
    return normalised_scores(asked, effects, clean, corrupted)


def _sites_patched(asked: Request, name: str, subsets: Sequence[Sequence[Place]]) -> dict[int, Site]:
    """The sites that are patched somewhere, by their place along the layer axis."""
    sites = dict(enumerate(asked.sites[name]))
    if "layer" not in asked.axes:
        return sites
    used = {place[0] for subset in subsets for place in subset}
    return {layer: site for layer, site in sites.items() if layer in used}


def _effects_on(
    asked: Request, group: Task, sites: Mapping[int, Site], subsets: Sequence[Sequence[Place]]
) -> tuple[Float[Tensor, "prompt subset"], Float[Tensor, " prompt"], Float[Tensor, " prompt"]]:
    """Effects on prompts of one length, and their metric in the clean and the corrupted run."""
    read = reading(asked.metric, group)
    base, other = (group.corrupted, group.clean) if asked.denoising else (group.clean, group.corrupted)
    source, other_metric = _activations(asked, other, group, list(sites.values()))
    variants = [
        Variant(prompt, _edits(asked, sites, subset, {site: values[prompt] for site, values in source.items()}))
        for prompt in range(len(group))
        for subset in [[], *subsets]
    ]
    values = sweep(
        asked.model,
        base,
        variants,
        read,
        columns=read.columns,
        batch_size=asked.batch_size,
        progress=asked.progress,
        description="verifying",
    ).reshape(len(group), 1 + len(subsets))
    unpatched, patched = values[:, :1], values[:, 1:]
    base_metric = unpatched[:, 0]
    if asked.denoising:
        return patched - unpatched, other_metric, base_metric
    return unpatched - patched, base_metric, other_metric


def _activations(
    asked: Request, tokens: Tensor, group: Task, sites: Sequence[Site]
) -> tuple[dict[Site, Tensor], Float[Tensor, " prompt"]]:
    """Activations of the sites in the run that patches come from, and its metric."""
    read, caches, metrics = reading(asked.metric, group), [], []
    for rows in batches(len(tokens), tokens.shape[1], asked.batch_size):
        logits, cache = asked.model.run_with_cache(tokens[rows], sites, logits_to_keep=1)
        metrics.append(read.of_all(logits[:, -1], torch.arange(len(tokens))[rows]))
        caches.append(cache)
    return {site: torch.cat([cache[site] for cache in caches]) for site in sites}, torch.cat(metrics)


def _edits(
    asked: Request, sites: Mapping[int, Site], subset: Sequence[Place], source: Mapping[Site, Tensor]
) -> tuple[Edit, ...]:
    """Edits that patch some cells: one a site and row of cells that differ along the last axis only."""
    by_layer = "layer" in asked.axes
    axes = asked.axes[1:] if by_layer else asked.axes
    rows: dict[tuple[Site, Place], list[int]] = defaultdict(list)
    for place in subset:
        inner = place[1:] if by_layer else place
        for site in [sites[place[0]]] if by_layer else sites.values():
            rows[site, inner[:-1]] += inner[-1:]
    return tuple(
        cell_edit(site, dict(zip(axes, [*first, last] if axes else [], strict=True)), source[site])
        for (site, first), last in rows.items()
    )


def _with_exact(asked: Request, estimate: xr.DataArray, k: int) -> xr.DataArray:
    if k < 1:
        raise ValueError(f"verify={k}: at least one entry has to be run exactly")
    started = time.perf_counter()
    name = estimate.attrs["site"]
    estimate = estimate.transpose("prompt", *asked.axes, missing_dims="ignore")
    scores = estimate.mean("prompt") if "prompt" in estimate.dims else estimate
    top = np.argsort(-np.abs(scores.values), axis=None, kind="stable")[:k]
    places = [tuple(map(int, np.unravel_index(one, scores.shape))) for one in top]
    effects = joint_effects(asked, name, [[place] for place in places])
    unsigned = bool(estimate.attrs.get("unsigned", 0))
    effects = effects.abs() if unsigned else effects
    exact = np.full((len(asked.task), scores.size), np.nan, dtype=estimate.dtype)
    exact[:, top] = effects.numpy()
    kept = exact if "prompt" in estimate.dims else exact.mean(0)
    found, guessed = effects.mean(0).double().numpy(), scores.values.ravel()[top].astype(np.float64)
    agreed = measures(guessed[None], found[None], ())
    attrs = {
        "verify_k": len(places),
        "verify_pearson": float(agreed["pearson"][0]),
        "verify_spearman": float(agreed["spearman"][0]),
        "verify_sign_agreement": float("nan") if unsigned else float((np.sign(found) == np.sign(guessed)).mean()),
        "verify_largest_error": float(np.abs(guessed - found).max()),
        "verify_seconds": time.perf_counter() - started,
    }
    return estimate.assign_coords(exact=(estimate.dims, kept.reshape(estimate.shape))).assign_attrs(attrs)


def request_of(
    model: Model,
    task: Task,
    estimate: xr.DataArray,
    metric: Metric | None,
    batch_size: int | None,
    progress: bool | None,
) -> Request:
    """The request that an estimate answered.

    Raises:
        ValueError: if it cannot be told from its attrs, or the task is another one.
    """
    attrs = estimate.attrs
    missing = [key for key in ("site", "direction", "metric", "normalised", "n_prompts") if key not in attrs]
    if missing:
        raise ValueError(
            f"the estimate's attrs lack {', '.join(missing)}: only results of this package can be verified"
        )
    if attrs["n_prompts"] != len(task):
        raise ValueError(f"the estimate is of {attrs['n_prompts']} prompts, the task has {len(task)}")
    if metric is None and attrs["metric"] not in METRICS:
        raise ValueError(f"the estimate's metric {attrs['metric']!r} is a function of your own: pass it as `metric`")
    return request(
        model,
        task,
        sites=[attrs["site"]],
        by=[axis for axis in AXES if axis in estimate.dims],
        direction=attrs["direction"],
        metric=metric or attrs["metric"],
        normalised=bool(attrs["normalised"]),
        per_prompt="prompt" in estimate.dims,
        batch_size=batch_size,
        progress=progress,
    )
