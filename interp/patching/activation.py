"""Activation patching: the exact effect of putting another activation in one place.

1. Run clean and corrupted prompts and keep the activations of the site.
2. For every prompt and every cell of the axes kept (`by`), run the base prompt with that cell replaced: by the other
   prompt's activation at the same place (resample), by the mean of the site, or by zero.
3. The effect of a cell is the change of the metric, signed so that positive means "supports the behaviour".
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.metrics import Metric, metric_named, normalised_effect
from interp.model import Model, Site
from interp.model.sites import LAYERLESS, SITE_DIMS
from interp.patching.batching import batches, mean_activations
from interp.patching.cells import AXES, Axis, cell_edit, grid
from interp.patching.labels import labelled
from interp.patching.reading import Reading, reading
from interp.patching.sweep import sweep, why_reference
from interp.patching.variant import Variant
from interp.tasks import Task

Direction = Literal["denoise", "noise"]
Ablation = Literal["resample", "mean", "zero"]


def activation_patching(
    model: Model,
    task: Task,
    *,
    site: str,
    by: Sequence[Axis] = ("layer", "position"),
    direction: Direction = "denoise",
    ablation: Ablation = "resample",
    metric: str | Metric | None = None,
    normalised: bool = True,
    per_prompt: bool = False,
    reference: bool = False,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Exact effect of patching a site, for every combination of the axes in `by`.

    Goes through the sweep engine: each prompt and cell costs the layers and positions from its patch on. Cells whose
    replacement equals what is there (such as all positions before the first token in which clean and corrupted differ)
    have effect 0 exactly and are not run.

    Args:
        model: the model.
        task: clean and corrupted prompts with answers.
        site: a kind of site ("z", "resid_pre", "pattern", ...).
        by: the axes kept. The others are patched together: ("layer", "head") patches a head at all positions at once.
        direction: "denoise": base run corrupted, clean activations put in: does that restore the behaviour? "noise":
            base run clean, corrupted (or mean, or zero) ones put in: does that break it?
        ablation: what is put in: the other prompt's activation ("resample"), the site's mean over prompts and positions
            of the clean runs, or zero. The last two break a behaviour, so they need direction="noise".
        metric: name in `interp.metrics.METRICS`, or a function of last-position logits, answers and wrong answers; the
            task's own by default.
        normalised: divide by the mean over prompts of metric(clean) − metric(corrupted). One number for all prompts, so
            that the mean of per-prompt effects is the effect.
        per_prompt: keep a leading `prompt` axis instead of averaging over prompts.
        reference: run every prompt and cell as a whole forward pass with plain hooks: slow, what the engine is held
            against, and in any case the way of families whose attention is outside transformers' interface (the attr
            `engine` says which way it was).
        batch_size: prompts or variants at once; by default what memory allows.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        DataArray with the dims in `by`, ordered layer, position, head, query, key, neuron; token strings beside
        positions.

    Raises:
        ValueError: for an axis that the site does not have, a position axis over prompts of several lengths, or, when
            normalised, a metric that does not tell clean from corrupted.
        FloatingPointError: if a run ends in NaN or infinity.
    """
    started = time.perf_counter()
    sites = model.site_names(site)
    axes = check_axes(sites, task, by)
    _check_choice(sites, direction, ablation)
    metric_name, metric_fn = resolve_metric(metric, task)
    patching = _Patching(model, sites, axes, direction, ablation, metric_fn, reference, batch_size, progress)
    groups = task.by_length()
    means = mean_activations(model, groups, sites, batch_size=batch_size) if ablation == "mean" else {}
    found = [patching.run(group, means) for group in groups]
    order = torch.cat([torch.as_tensor(group.index) for group in groups]).argsort()
    effects, clean, corrupted = (torch.cat(parts)[order] for parts in zip(*found, strict=True))
    if normalised:
        effects = normalised_shares(effects, clean, corrupted, metric_name)
    attrs = {
        "method": "activation_patching",
        "site": site,
        "direction": direction,
        "ablation": ablation,
        "metric": metric_name,
        "normalised": int(normalised),
        "metric_clean": float(clean.mean()),
        "metric_corrupted": float(corrupted.mean()),
        "engine": engine_note(model, sites, reference=reference),
        "seconds": time.perf_counter() - started,
    }
    values, dims = (effects, ("prompt", *axes)) if per_prompt else (effects.mean(0), axes)
    return labelled(values, dims, model, task, attrs, sites=sites)


def resolve_metric(metric: str | Metric | None, task: Task) -> tuple[str, Metric]:
    """Name and function of a metric; the task's own for None.

    Raises:
        ValueError: for an unknown name.
    """
    metric = task.metric if metric is None else metric
    if isinstance(metric, str):
        return metric, metric_named(metric)
    return getattr(metric, "__name__", "custom"), metric


def check_axes(sites: Sequence[Site], task: Task, by: Sequence[Axis]) -> tuple[Axis, ...]:
    """The axes to keep, in the order of `AXES`.

    Raises:
        ValueError: for sites of several kinds, an axis that the kind does not have, or a position axis over prompts of
            several lengths.
    """
    kind = sites[0].kind
    if any(site.kind != kind for site in sites):
        raise ValueError(
            f"one sweep patches one kind of site; got {', '.join(dict.fromkeys(one.kind for one in sites))}"
        )
    possible = [axis for axis in AXES if axis in SITE_DIMS[kind] or (axis == "layer" and kind not in LAYERLESS)]
    for axis in by:
        if axis not in possible:
            raise ValueError(f"site {kind!r} has no axis {axis!r} to keep; it has {', '.join(possible)}")
    if {"position", "query", "key"} & set(by) and len(task.by_length()) > 1:
        raise ValueError(
            "the prompts have several lengths: patch each of task.by_length(), or leave positions out of `by`"
        )
    return tuple(axis for axis in AXES if axis in by)


def _check_choice(sites: Sequence[Site], direction: Direction, ablation: Ablation) -> None:
    for name, value, choices in (
        ("direction", direction, ("denoise", "noise")),
        ("ablation", ablation, ("resample", "mean", "zero")),
    ):
        if value not in choices:
            raise ValueError(f"{name}={value!r}; it is one of {', '.join(choices)}")
    if ablation != "resample" and direction == "denoise":
        raise ValueError(f"{ablation} ablation breaks a behaviour and restores none: use direction='noise'")
    if ablation == "mean" and "position" not in SITE_DIMS[sites[0].kind]:
        raise ValueError(f"site {sites[0].kind!r} has no mean over positions: use resample or zero ablation")


def normalised_shares(
    effects: Float[Tensor, "prompt ..."],
    clean: Float[Tensor, " prompt"],
    corrupted: Float[Tensor, " prompt"],
    name: str,
) -> Float[Tensor, "prompt ..."]:
    """Effects as shares of the mean gap between clean and corrupted.

    Raises:
        ValueError: if there is no gap.
    """
    shares = normalised_effect(effects, clean.mean(), corrupted.mean())
    if bool(shares.isnan().all()):
        raise ValueError(
            f"the mean {name} is the same for clean and corrupted prompts, so there is nothing to be a share of: "
            "use normalised=False or another metric"
        )
    return shares


def engine_note(model: Model, sites: Sequence[Site], *, reference: bool = False) -> str:
    """How counterfactual runs with edits at these sites are made, for a result's attrs."""
    if reference:
        return "reference (asked for)"
    reason = why_reference(model, sites)
    return f"reference: {reason}" if reason else "packed sweep"


@dataclass(frozen=True)
class _Patching:
    """One call's choices, so that its steps need not hand them on one by one."""

    model: Model
    sites: Sequence[Site]
    axes: tuple[Axis, ...]
    direction: Direction
    ablation: Ablation
    metric: Metric
    reference: bool
    batch_size: int | None
    progress: bool | None

    def run(
        self, task: Task, means: Mapping[Site, Tensor]
    ) -> tuple[Float[Tensor, "prompt ..."], Float[Tensor, " prompt"], Float[Tensor, " prompt"]]:
        """Effects (not normalised) on prompts of one length, and their unpatched metric, clean and corrupted."""
        read = reading(self.metric, task)
        denoising = self.direction == "denoise"
        tokens, other = (task.corrupted, task.clean) if denoising else (task.clean, task.corrupted)
        other_metric, activations = self.other_run(other, read)
        source = self.replacements(activations, means)
        lengths, cells = grid(self.sites, self.axes, activations[self.sites[0]].shape)
        variants = [
            Variant(prompt, tuple(cell_edit(site, place, values[site]) for site, place in cell))
            for prompt in range(len(task))
            for values in [{site: source[site][prompt] for site in self.sites}]
            for cell in [(), *cells]
        ]
        values = sweep(
            self.model,
            tokens,
            variants,
            read,
            columns=read.columns,
            reference=self.reference,
            batch_size=self.batch_size,
            progress=self.progress,
            description=f"patching {self.sites[0].kind}",
        ).reshape(len(task), 1 + len(cells))
        # Each prompt's first variant has no edits: what has no effect has the same value to the last bit.
        unpatched, patched = values[:, :1], values[:, 1:]
        effects = patched - unpatched if denoising else unpatched - patched
        base_metric = unpatched[:, 0]
        both = (other_metric, base_metric) if denoising else (base_metric, other_metric)
        return effects.reshape(len(task), *lengths), *both

    def other_run(
        self, tokens: Int[Tensor, "prompt pos"], read: Reading
    ) -> tuple[Float[Tensor, " prompt"], dict[Site, Tensor]]:
        """Metric of the prompts that are not the base, and their activations at the site, layer by layer."""
        metrics, caches = [], []
        for which in batches(len(tokens), tokens.shape[1], self.batch_size):
            logits, cache = self.model.run_with_cache(tokens[which], self.sites, logits_to_keep=1)
            metrics.append(read.of_all(logits[:, -1], torch.arange(len(tokens))[which]))
            caches.append(cache)
        return torch.cat(metrics), {site: torch.cat([cache[site] for cache in caches]) for site in self.sites}

    def replacements(self, source: Mapping[Site, Tensor], means: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """What is put in, for each site, with the shape of the activations."""
        if self.ablation == "zero":
            return {site: torch.zeros_like(activation) for site, activation in source.items()}
        if self.ablation == "mean":
            return {site: means[site].expand_as(activation) for site, activation in source.items()}
        return dict(source)
