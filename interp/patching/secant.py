"""Secant patching: an estimate whose scores add up exactly, because its backward pass carries finite differences.

1. Run the corrupted prompts and keep what every non-linear operation sees.
2. Run the clean prompts; every non-linear operation now knows both runs, and hands back Δout/Δin instead of a
   derivative.
3. One backward pass from the metric gives a multiplier m for every activation a, and a score Δa·m, Δ = clean −
   corrupted.

By the chain rule the scores of any cut through the model, such as the residual stream of one layer, add up to
metric(clean) − metric(corrupted), and what flows out of a head flows into its q, k and v. Where parts interact, exact
denoising and noising effects differ; here what an interaction does is shared between the parts, and there is one score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.metrics import Metric
from interp.model import Model, Site
from interp.patching.activation import Direction
from interp.patching.cells import Axis
from interp.patching.estimate import BatchScores, Pair, Request, as_measured, collect, request
from interp.patching.rules.parts import Parts
from interp.patching.rules.secant import ROUNDING, secant_correction, with_multiplier
from interp.patching.rules.secant_rules import kept_run, secant_parts, secant_rules
from interp.patching.verify import verified_top
from interp.tasks import Task


def secant_patching(
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
    """Share of the metric's difference that flows through each part of a site, for the axes in `by`.

    Costs two forward passes and one backward pass. Of a batch of prompts it holds the inputs of every non-linear
    operation in both runs; a smaller `batch_size` needs less.

    Args:
        model: a model whose attention goes through transformers' interface.
        task: clean and corrupted prompts with answers.
        site: a kind of site ("z", "resid_pre", "pattern", ...).
        by: the axes kept; scores are summed over the others.
        direction: kept so that methods can be swapped: scores are the same for both, since Δ and the multipliers are.
            Hold them against the mean of denoising and noising effects as well as against either.
        metric: as in `activation_patching`. One that is not linear in the logits gets a secant of its own.
        normalised: as in `activation_patching`: all scores of a whole layer's stream then add up to 1.
        per_prompt: keep a leading `prompt` axis instead of averaging over prompts.
        verify: re-compute this many entries of largest magnitude exactly, in this direction: see `verify_top`.
        batch_size: prompts a pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        DataArray with the dims, sign and scale of `activation_patching`. The attr `conservation_gap` is what the scores
        of the embeddings miss of the metric's difference, as a share of its largest value; rounding if all is well.

    Raises:
        ValueError: for an axis that the site does not have, a position axis over prompts of several lengths, a metric
            without a gradient or, when normalised, one that does not tell clean from corrupted.
        UnsupportedModel: if a part of the model is of no known kind, naming its dotted path.
        NotImplementedError: if transformers implements its attention outside the AttentionInterface.
        FloatingPointError: if a run or a score is NaN or infinite.
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
    return verified_top(asked, secant_scores(asked), verify)[site]


def secant_scores(asked: Request) -> dict[str, xr.DataArray]:
    """`secant_patching` of all sites asked for, in one backward pass a batch; by the name of the site."""
    parts = secant_parts(asked.model)
    gaps: list[Tensor] = []

    def run_batch(prompts: Task) -> BatchScores:
        measured = list(dict.fromkeys([Site("embed"), *map(as_measured, asked.all_sites)]))
        pair = run_secant_pair(asked, prompts, measured, parts)
        clean, corrupted = pair.clean_and_corrupted
        difference = (clean - corrupted).cpu()
        gaps.append(torch.stack([pair.first_order(Site("embed")).flatten(1).sum(1).cpu() - difference, difference]))
        scores = {
            name: asked.cells(sites, lambda site: pair.first_order(as_measured(site)))
            for name, sites in asked.sites.items()
        }
        return BatchScores(scores, clean, corrupted)

    def conservation_gap() -> float:
        gap, difference = torch.cat(gaps, dim=1).abs().amax(1).tolist()
        return gap / difference if difference else math.nan

    return collect(asked, run_batch, method="secant_patching", attrs={"conservation_gap": conservation_gap})


def run_secant_pair(asked: Request, prompts: Task, sites: Sequence[Site], parts: Parts) -> Pair:
    """The corrupted run, kept, then the clean run with secant multipliers as its gradients.

    Args:
        asked: the call's choices.
        prompts: prompts of one length.
        sites: whose activations and multipliers are kept.
        parts: what `secant_parts` found in the model.
    """
    model = asked.model
    with kept_run(model, parts) as other:
        logits_other, activations_other = model.run_with_cache(prompts.corrupted, sites, logits_to_keep=1)

    score = partial(asked.score, prompts=prompts)
    with secant_rules(model, other):
        values, activations, multipliers = model.run_with_gradients(
            prompts.clean,
            lambda logits: secant_metric(score, logits[:, -1], logits_other[:, -1]),
            sites,
            logits_to_keep=1,
        )
    values_other = score(logits_other[:, -1])
    return Pair(activations, activations_other, multipliers, values, values_other, denoising=False)


def secant_metric(
    score: Callable[[Tensor], Tensor],
    logits: Float[Tensor, "prompt d_vocab"],
    logits_other: Float[Tensor, "prompt d_vocab"],
) -> Float[Tensor, " prompt"]:
    """Values of a metric with a backward pass that explains its difference between two runs exactly.

    That is the gradient if the metric is linear; else the mean of both runs' gradients, with what they leave
    unexplained put on the difference of the logits.

    Args:
        score: from logits to one value a prompt.
        logits: of the run that the backward pass goes through.
        logits_other: of the other run.
    """
    (value, gradient), (value_other, gradient_other) = (
        _value_and_gradient(score, one) for one in (logits, logits_other)
    )
    with torch.no_grad():
        gradient = torch.lerp(gradient_other, gradient, 0.5)
        here, other = (one.detach().to(gradient.dtype) for one in (logits, logits_other))
        size = (gradient * here).abs().sum(-1) + (gradient * other).abs().sum(-1) + value.abs() + value_other.abs()
        rounding = ROUNDING * torch.finfo(value.dtype).eps * size
        multiplier = secant_correction(gradient, here - other, value - value_other, rounding)
    return with_multiplier(logits, value, multiplier)


def _value_and_gradient(
    score: Callable[[Tensor], Tensor], logits: Float[Tensor, "prompt d_vocab"]
) -> tuple[Float[Tensor, " prompt"], Float[Tensor, "prompt d_vocab"]]:
    """In float32 at least."""
    with torch.enable_grad():
        leaf = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).requires_grad_()
        value = score(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient
