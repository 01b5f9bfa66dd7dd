"""Estimates from plain gradients: attribution patching, and two baselines that look at the clean run alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import xarray as xr
from torch import Tensor

from interp.metrics import Metric
from interp.model import Model, Site
from interp.model.sites import SITE_DIMS
from interp.patching.activation import Direction
from interp.patching.cells import Axis
from interp.patching.estimate import BatchScores, Request, as_measured, collect, first_order_scores, request, widened
from interp.patching.verify import verified_top
from interp.tasks import Task


def attribution_patching(
    model: Model,
    task: Task,
    *,
    site: str,
    by: Sequence[Axis] = ("layer", "position"),
    direction: Direction = "denoise",
    metric: str | Metric | None = None,
    normalised: bool = True,
    per_prompt: bool = False,
    verify: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Attribution patching (AtP): activation patching to first order, for all cells from one backward pass.

    A score is Σ (clean − corrupted activation) · gradient of the metric at the base run. It is exact where the model is
    linear between the runs, and misleads where a softmax is saturated, at norms of early layers, and where effects
    through and round a layer cancel.

    Costs two forward passes and one backward pass.

    Args:
        model: the model.
        task: clean and corrupted prompts with answers.
        site: a kind of site ("z", "resid_pre", "pattern", ...).
        by: the axes kept; scores are summed over the others, which `activation_patching` patches together.
        direction: the base run is the corrupted one for "denoise", the clean one for "noise".
        metric: name in `interp.metrics.METRICS` or a function, with a gradient; the task's own by default.
        normalised: divide by the mean over prompts of metric(clean) − metric(corrupted).
        per_prompt: keep a leading `prompt` axis instead of averaging over prompts.
        verify: re-compute this many entries of largest magnitude exactly: see `verify_top`.
        batch_size: prompts a pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        An array with the dims, sign and scale of `activation_patching`.

    Raises:
        ValueError: for an axis that the site does not have, a position axis over prompts of several lengths, a metric
            without a gradient or, when normalised, one that does not tell clean from corrupted.
        FloatingPointError: if a run or a score is NaN or infinite.

    Source: Nanda 2023; Syed et al. 2023 (arXiv 2310.10348).
    """
    asked = request(
        model,
        task,
        sites=[site],
        by=by,
        direction=direction,
        metric=metric,
        normalised=normalised,
        per_prompt=per_prompt,
        batch_size=batch_size,
        progress=progress,
    )
    return verified_top(asked, attribution_scores(asked), verify)[site]


def gradient_times_input(
    model: Model,
    task: Task,
    *,
    site: str,
    by: Sequence[Axis] = ("layer", "position"),
    direction: Direction = "denoise",
    metric: str | Metric | None = None,
    normalised: bool = True,
    per_prompt: bool = False,
    verify: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Activation times gradient at the clean run: a baseline that knows nothing of the corrupted prompts.

    To first order, what the metric loses if the activation becomes zero.

    Costs one forward and backward pass, and a forward pass of the corrupted prompts for the scale.

    Args:
        model: the model.
        task: clean and corrupted prompts with answers.
        site: as in `attribution_patching`.
        by: as in `attribution_patching`.
        direction: of the exact effects that it is held against and verified by; the scores are the same for both.
        metric: as in `attribution_patching`.
        normalised: as in `attribution_patching`.
        per_prompt: as in `attribution_patching`.
        verify: as in `attribution_patching`.
        batch_size: as in `attribution_patching`.
        progress: as in `attribution_patching`.
    """
    asked = request(
        model,
        task,
        sites=[site],
        by=by,
        direction=direction,
        metric=metric,
        normalised=normalised,
        per_prompt=per_prompt,
        batch_size=batch_size,
        progress=progress,
    )
    return verified_top(asked, gradient_times_input_scores(asked), verify)[site]


def normgrad(
    model: Model,
    task: Task,
    *,
    site: str,
    by: Sequence[Axis] = ("layer", "position"),
    direction: Direction = "denoise",
    metric: str | Metric | None = None,
    normalised: bool = True,
    per_prompt: bool = False,
    verify: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Norm of the activation times norm of the gradient at the clean run: a baseline without sign.

    The norms are over the features of one position (and head, where the site has heads): the largest change of the
    metric, to first order, that a change of the activation's own size could make. Unsigned.

    Costs one forward and backward pass, and a forward pass of the corrupted prompts for the scale.

    Args:
        model: the model.
        task: clean and corrupted prompts with answers.
        site: as in `attribution_patching`.
        by: the axes kept; products of norms are summed over the other positions, heads and layers.
        direction: of the exact effects that it is held against and verified by; the scores are the same for both.
        metric: as in `attribution_patching`.
        normalised: divide by the magnitude of the mean of metric(clean) − metric(corrupted).
        per_prompt: as in `attribution_patching`.
        verify: as in `attribution_patching`.
        batch_size: as in `attribution_patching`.
        progress: as in `attribution_patching`.

    Source: Rebuffi et al. 2020 (arXiv 2004.02866).
    """
    asked = request(
        model,
        task,
        sites=[site],
        by=by,
        direction=direction,
        metric=metric,
        normalised=normalised,
        per_prompt=per_prompt,
        batch_size=batch_size,
        progress=progress,
    )
    return verified_top(asked, normgrad_scores(asked), verify)[site]


def attribution_scores(asked: Request) -> dict[str, xr.DataArray]:
    """`attribution_patching` of all sites asked for, in one backward pass a batch."""
    return first_order_scores(asked, method="attribution_patching")


def gradient_times_input_scores(asked: Request) -> dict[str, xr.DataArray]:
    """`gradient_times_input` of all sites asked for, in one backward pass a batch."""
    return _clean_run_scores(
        asked, lambda activation, gradient, site: activation * gradient, as_measured, method="gradient_times_input"
    )


def normgrad_scores(asked: Request) -> dict[str, xr.DataArray]:
    """`normgrad` of all sites asked for, in one backward pass a batch."""

    def product(activation: Tensor, gradient: Tensor, site: Site) -> Tensor:
        kept = {"batch", "position", "head", "query", "key", *asked.axes}
        features = [place for place, dim in enumerate(SITE_DIMS[site.kind]) if dim not in kept]
        if not features:
            return (activation * gradient).abs()
        return activation.norm(dim=features, keepdim=True) * gradient.norm(dim=features, keepdim=True)

    return _clean_run_scores(asked, product, lambda site: site, method="normgrad", unsigned=True)


def _clean_run_scores(
    asked: Request,
    product: Callable[[Tensor, Tensor, Site], Tensor],
    measured: Callable[[Site], Site],
    *,
    method: str,
    unsigned: bool = False,
) -> dict[str, xr.DataArray]:
    """Scores from activations and gradients of the clean run.

    Args:
        asked: the call's choices.
        product: from activation, gradient and site to one number an element.
        measured: where a site is read.
        method: name of the estimate.
        unsigned: whether scores are magnitudes.
    """
    sites = list(dict.fromkeys(map(measured, asked.all_sites)))

    def run_batch(prompts: Task) -> BatchScores:
        clean, activations, gradients = asked.model.run_with_gradients(
            prompts.clean, lambda logits: asked.score(logits[:, -1], prompts), sites, logits_to_keep=1
        )
        corrupted = asked.score(asked.model(prompts.corrupted, logits_to_keep=1)[:, -1], prompts)

        def of_site(site: Site) -> Tensor:
            site = measured(site)
            activation = widened(activations[site])
            if site.kind == "attn_scores":
                activation = activation.masked_fill(activation.isneginf(), 0.0)
            return product(activation, widened(gradients[site]), site)

        scores = {name: asked.cells(several, of_site) for name, several in asked.sites.items()}
        return BatchScores(scores, clean, corrupted)

    return collect(asked, run_batch, method=method, unsigned=unsigned)
