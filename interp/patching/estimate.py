"""What all estimates share: one call's choices, the two runs, scores by cell, and the result as labelled arrays.

1. Check what is asked for (`request`), before the first forward pass.
2. For each batch of prompts: the other run without gradients, the base run with one backward pass (`run_pair`).
3. Reduce a product of every element of an activation to the axes kept (`Request.cells`).
4. Put batches and prompt lengths together, normalise, label (`collect`).

`first_order_scores` is these steps for everything that is a difference of activations times a gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.metrics import Metric
from interp.model import Model, Site
from interp.model.hooks import Tap, tapped
from interp.model.sites import SITE_DIMS
from interp.patching.activation import Direction, check_axes, normalised_shares, resolve_metric
from interp.patching.batching import batches
from interp.patching.cells import Axis
from interp.patching.labels import labelled
from interp.patching.progress import progress_bar
from interp.tasks import Task


@dataclass(frozen=True)
class Request:
    """One call's choices, checked; made by `request`."""

    model: Model
    task: Task
    sites: Mapping[str, tuple[Site, ...]]
    """Sites by the name under which they were asked for, each one kind in all its layers."""
    axes: tuple[Axis, ...]
    direction: Direction
    metric_name: str
    metric: Metric
    normalised: bool
    per_prompt: bool
    batch_size: int | None
    progress: bool | None

    @property
    def denoising(self) -> bool:
        """Whether the base run is the corrupted one."""
        return self.direction == "denoise"

    @property
    def all_sites(self) -> list[Site]:
        """Every site asked for, once."""
        return list(dict.fromkeys(site for several in self.sites.values() for site in several))

    def score(self, logits: Float[Tensor, "batch d_vocab"], prompts: Task) -> Float[Tensor, " batch"]:
        """The metric of last-position logits of these prompts; differentiable."""
        return self.metric(logits, prompts.answers.to(logits.device), prompts.wrong.to(logits.device))

    @torch.no_grad()
    def cells(self, sites: Sequence[Site], of_site: Callable[[Site], Tensor]) -> Float[Tensor, "batch ..."]:
        """Scores by cell on the CPU: elements summed over axes not kept, layers stacked or summed.

        Args:
            sites: the layers of one kind of site.
            of_site: from a site to one number an element of its activation.
        """
        layers = [reduced(of_site(site), site, self.axes).cpu() for site in sites]
        stacked = torch.stack(layers, dim=1)
        return stacked if "layer" in self.axes else stacked.sum(1)


def request(
    model: Model,
    task: Task,
    *,
    sites: Sequence[str],
    by: Sequence[Axis],
    direction: Direction,
    metric: str | Metric | None,
    normalised: bool,
    per_prompt: bool,
    batch_size: int | None,
    progress: bool | None,
) -> Request:
    """The choices of one call, checked against the model and the task.

    Raises:
        ValueError: for an unknown site or direction, an axis that a site does not have, a position axis over prompts of
            several lengths, or a metric without a gradient.
    """
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction={direction!r}; it is one of denoise, noise")
    found = {name: tuple(model.site_names(name)) for name in ([sites] if isinstance(sites, str) else sites)}
    if not found:
        raise ValueError("no sites were asked for")
    axes = check_axes(next(iter(found.values())), task, by)
    for several in found.values():
        check_axes(several, task, by)
    metric_name, metric_fn = resolve_metric(metric, task)
    _check_gradient(metric_name, metric_fn, model, task)
    return Request(
        model, task, found, axes, direction, metric_name, metric_fn, normalised, per_prompt, batch_size, progress
    )


def _check_gradient(name: str, metric: Metric, model: Model, task: Task) -> None:
    with torch.enable_grad():
        probe = torch.zeros(1, model.d_vocab, requires_grad=True)
        has_gradient = metric(probe, task.answers[:1], task.wrong[:1]).requires_grad
    if not has_gradient:
        raise ValueError(f"the metric {name!r} has no gradient, which estimates need: use logit_diff or log_prob")


@dataclass(frozen=True)
class BatchScores:
    """What an estimate finds out about one batch of prompts."""

    scores: Mapping[str, Float[Tensor, "batch ..."]]
    """By name of the site, one score a cell; positive = supports the behaviour; not normalised."""
    clean: Float[Tensor, " batch"]
    """Metric of the clean run."""
    corrupted: Float[Tensor, " batch"]
    """Metric of the corrupted run."""


def collect(
    asked: Request,
    run_batch: Callable[[Task], BatchScores],
    *,
    method: str,
    attrs: Mapping[str, Any] | None = None,
    unsigned: bool = False,
) -> dict[str, xr.DataArray]:
    """Run an estimate over all prompts, batch by batch, and label what it finds.

    Args:
        asked: the call's choices.
        run_batch: the estimate, on prompts of one length.
        method: its name, for the result's attrs.
        attrs: what else it says of itself; what is callable is called after the last batch.
        unsigned: whether scores are magnitudes: they stay positive when normalised, and attrs say so.

    Raises:
        FloatingPointError: if a score is NaN or infinite.
    """
    started = time.perf_counter()
    groups = asked.task.by_length()
    found: list[BatchScores] = []
    with progress_bar(len(asked.task), method, "prompt", progress=asked.progress) as bar:
        for group in groups:
            for rows in batches(len(group), len(group.clean_ids[0]), asked.batch_size):
                found.append(run_batch(group[rows]))
                bar.update(len(found[-1].clean))
    order = torch.cat([group.index for group in groups]).argsort()
    clean, corrupted = (torch.cat([getattr(one, run).cpu() for one in found])[order] for run in ("clean", "corrupted"))
    said = {
        "method": method,
        "direction": asked.direction,
        "metric": asked.metric_name,
        "normalised": int(asked.normalised),
        "unsigned": int(unsigned),
        "metric_clean": float(clean.mean()),
        "metric_corrupted": float(corrupted.mean()),
        "seconds": time.perf_counter() - started,
        **{key: value() if callable(value) else value for key, value in (attrs or {}).items()},
    }
    results = {}
    for name in asked.sites:
        scores = torch.cat([one.scores[name] for one in found])[order]
        if not bool(scores.isfinite().all()):
            raise FloatingPointError(f"{method}: scores of {name!r} are NaN or infinite: check metric, weights, dtype")
        scores = normalised_scores(asked, scores, clean, corrupted)
        results[name] = _labelled(asked, name, scores.abs() if unsigned else scores, said)
    return results


def normalised_scores(
    asked: Request,
    scores: Float[Tensor, "prompt ..."],
    clean: Float[Tensor, " prompt"],
    corrupted: Float[Tensor, " prompt"],
) -> Float[Tensor, "prompt ..."]:
    """Scores as shares of the mean gap between the metric of clean and corrupted runs, if that was asked for."""
    return normalised_shares(scores, clean, corrupted, asked.metric_name) if asked.normalised else scores


def _labelled(asked: Request, name: str, scores: Float[Tensor, "prompt ..."], attrs: Mapping[str, Any]) -> xr.DataArray:
    values, dims = (scores, ("prompt", *asked.axes)) if asked.per_prompt else (scores.mean(0), asked.axes)
    return labelled(values, dims, asked.model, asked.task, {"site": name, **attrs}, sites=asked.sites[name])


@dataclass(frozen=True)
class Pair:
    """The two runs of a batch of prompts, with the gradient of each prompt's metric at the base run."""

    base: Mapping[str, Tensor]
    other: Mapping[str, Tensor]
    gradient: Mapping[str, Tensor]
    base_metric: Float[Tensor, " batch"]
    other_metric: Float[Tensor, " batch"]
    denoising: bool

    @property
    def clean_and_corrupted(self) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Metric of the clean and of the corrupted run."""
        both = (self.other_metric, self.base_metric)
        return both if self.denoising else both[::-1]

    def difference(self, site: Site) -> Tensor:
        """As `clean_minus_corrupted`."""
        return clean_minus_corrupted(self.base[site], self.other[site], site, denoising=self.denoising)

    def first_order(self, site: Site) -> Tensor:
        """Difference times gradient, element by element."""
        difference = self.difference(site)
        return difference.mul_(self.gradient[site])


def run_pair(
    asked: Request,
    prompts: Task,
    sites: Sequence[Site],
    *,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Pair:
    """The other run without gradients, then the base run with one backward pass.

    Args:
        asked: the call's choices.
        prompts: prompts of one length.
        sites: whose activations and gradients are kept.
        within: makes the context in which the base run and its backward pass happen.
    """
    base_tokens, others, other_metric = run_other(asked, prompts, sites)
    with within():
        values, activations, gradients = asked.model.run_with_gradients(
            base_tokens, lambda logits: asked.score(logits[:, -1], prompts), sites, logits_to_keep=1
        )
    return Pair(activations, others, gradients, values, other_metric, asked.denoising)


def run_other(
    asked: Request, prompts: Task, sites: Sequence[Site]
) -> tuple[Int[Tensor, "batch pos"], Mapping[str, Tensor], Float[Tensor, " batch"]]:
    """(tokens of the base run, activations of the other run, its metric)."""
    base, other = (prompts.corrupted, prompts.clean) if asked.denoising else (prompts.clean, prompts.corrupted)
    # Scores and pattern on the path of gradients make attention go another way, and change the last bits: here as well,
    # so that what is the same in both runs stays the same.
    inside = [
        Tap(site, lambda activation, run: activation.clone())
        for site in sites
        if site.kind in ("attn_scores", "pattern")
    ]
    with tapped(asked.model.anatomy, inside):
        logits, activations = asked.model.run_with_cache(other, sites, logits_to_keep=1)
    return base, activations, asked.score(logits[:, -1], prompts)


def first_order_scores(
    asked: Request,
    *,
    method: str,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    attrs: Mapping[str, Any] | None = None,
) -> dict[str, xr.DataArray]:
    """Difference of activations between the runs times the gradient at the base run, for all sites asked for.

    Costs two forward passes and one backward pass a batch of prompts, and holds three times the activations of the
    sites.

    Args:
        asked: the call's choices.
        method: name of the estimate, for the results' attrs.
        within: makes a context for the base run, such as relevance rules that change its backward pass.
        attrs: what else the estimate says of itself.

    Returns:
        By the name of the site, an array with the dims, sign and scale of `activation_patching`.
    """
    measured = list(dict.fromkeys(map(as_measured, asked.all_sites)))

    def run_batch(prompts: Task) -> BatchScores:
        pair = run_pair(asked, prompts, measured, within=within)
        scores = {
            name: asked.cells(sites, lambda site: pair.first_order(as_measured(site)))
            for name, sites in asked.sites.items()
        }
        return BatchScores(scores, *pair.clean_and_corrupted)

    return collect(asked, run_batch, method=method, attrs=attrs)


def as_measured(site: Site) -> Site:
    """Where a product with a gradient is read: head results at z.

    What leaves the output projection is linear in z, head by head, so that both give the same score; and head results
    of a whole model are larger than all its other activations together.
    """
    return Site("z", site.layer, tower=site.tower) if site.kind == "result" else site


def clean_minus_corrupted(base: Tensor, other: Tensor, site: Site, *, denoising: bool) -> Tensor:
    """Activation in the clean run minus that in the corrupted one, in float32 at least; masked scores count as 0."""
    base, other = widened(base), widened(other)
    difference = other - base if denoising else base - other
    return difference.masked_fill_(difference.isnan(), 0.0) if site.kind == "attn_scores" else difference


def reduced(elements: Tensor, site: Site, axes: Sequence[Axis]) -> Float[Tensor, "batch ..."]:
    """One number an element of an activation, summed over all axes but the batch and those kept."""
    dims = SITE_DIMS[site.kind]
    gone = [place for place, dim in enumerate(dims) if dim != "batch" and dim not in axes]
    return elements.sum(gone) if gone else elements


def widened(values: Tensor) -> Tensor:
    """The same values in float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
