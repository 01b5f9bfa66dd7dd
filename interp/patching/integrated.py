"""Integrated gradients: gradients averaged on the way from the base run to the other run.

Two ways to go there. On the embedding path the token embeddings are interpolated and everything else follows; a site's
score is its difference between the two runs times its mean gradient (EAP-IG's "inputs"). On the activation path one
site of one layer at a time is interpolated in the base run and the rest recomputed; its scores add up to the exact
effect of patching it whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.metrics import Metric
from interp.model import Model, Site
from interp.model.hooks import Tap, tapped
from interp.patching.activation import Direction
from interp.patching.cells import Axis
from interp.patching.estimate import (
    BatchScores,
    Pair,
    Request,
    as_measured,
    clean_minus_corrupted,
    collect,
    request,
    run_other,
    widened,
)
from interp.patching.verify import verified_top
from interp.tasks import Task

Rule = Literal["midpoint", "left", "right", "gauss-legendre"]
Path = Literal["embedding", "activation"]
RULES: tuple[Rule, ...] = ("midpoint", "left", "right", "gauss-legendre")
PATHS: tuple[Path, ...] = ("embedding", "activation")


def integrated_gradients(
    model: Model,
    task: Task,
    *,
    site: str,
    by: Sequence[Axis] = ("layer", "position"),
    direction: Direction = "denoise",
    metric: str | Metric | None = None,
    normalised: bool = True,
    per_prompt: bool = False,
    steps: int = 10,
    rule: Rule = "midpoint",
    path: Path = "embedding",
    verify: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Difference of activations times the gradient averaged on the way between the two runs.

    Costs, beside two forward passes, `steps` forward and backward passes on the embedding path, and as many for each
    layer (and one forward pass more) on the activation path.

    Args:
        model: the model.
        task: clean and corrupted prompts with answers.
        site: a kind of site ("z", "resid_pre", ...).
        by: as in `attribution_patching`.
        direction: the way goes from the corrupted run to the clean one for "denoise", back for "noise". On the
            embedding path both give the same up to the rule's error.
        metric: as in `attribution_patching`.
        normalised: as in `attribution_patching`.
        per_prompt: as in `attribution_patching`.
        steps: points on the way at which the gradient is taken.
        rule: which: "left" begins with the base run, "right" ends with the other run, "midpoint" lies between,
            "gauss-legendre" is exact for polynomials of degree 2 · steps − 1.
        path: "embedding" or "activation", see above.
        verify: as in `attribution_patching`.
        batch_size: as in `attribution_patching`.
        progress: as in `attribution_patching`.

    Returns:
        An array with the dims, sign and scale of `activation_patching`. The attr `completeness_gap` is the error of the
        rule: how far scores miss what they must add up to, as a mean over prompts of the magnitude, in the unit of the
        metric. That is, on the embedding path, metric(clean) − metric(corrupted) for the embeddings themselves; on the
        activation path the exact effect of the whole site, for the layer where it is furthest off.

    Raises:
        ValueError: as `attribution_patching`, and for an unknown rule or path or less than one step.
        FloatingPointError: if a run or a score is NaN or infinite.

    Source: Sundararajan et al. 2017 (arXiv 1703.01365); Hanna et al. 2024 (arXiv 2403.17806), the embedding path; Marks
    et al. 2024 (arXiv 2403.19647), the activation path, with steps=10 and rule="left".
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
    return verified_top(asked, integrated_scores(asked, steps=steps, rule=rule, path=path), verify)[site]


def integrated_scores(
    asked: Request, *, steps: int = 10, rule: Rule = "midpoint", path: Path = "embedding"
) -> dict[str, xr.DataArray]:
    """`integrated_gradients` of all sites asked for; on the embedding path they share every pass."""
    if path not in PATHS:
        raise ValueError(f"path={path!r}; it is one of {', '.join(PATHS)}")
    points = rule_points(steps, rule)
    gaps: list[Tensor] = []
    along = _along_embeddings if path == "embedding" else _along_activations

    def run_batch(prompts: Task) -> BatchScores:
        scores, gap = along(asked, prompts, points)
        gaps.append(gap)
        return scores

    return collect(
        asked,
        run_batch,
        method="integrated_gradients",
        attrs={
            "path": path,
            "rule": rule,
            "steps": steps,
            "completeness_gap": lambda: float(torch.cat(gaps).abs().mean(0).max()),
        },
    )


def rule_points(steps: int, rule: Rule) -> list[tuple[float, float]]:
    """(place between 0 and 1, weight) of each point of a quadrature rule; the weights add up to 1.

    Raises:
        ValueError: for an unknown rule or less than one step.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: the gradient has to be taken at one point at least")
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}; it is one of {', '.join(RULES)}")
    if rule == "gauss-legendre":
        places, weights = np.polynomial.legendre.leggauss(steps)
        return [(float(place + 1) / 2, float(weight) / 2) for place, weight in zip(places, weights, strict=True)]
    shift = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[rule]
    return [((step + shift) / steps, 1 / steps) for step in range(steps)]


def _along_embeddings(
    asked: Request, prompts: Task, points: Sequence[tuple[float, float]]
) -> tuple[BatchScores, Float[Tensor, "batch 1"]]:
    embed = Site("embed")
    sites = list(dict.fromkeys([embed, *map(as_measured, asked.all_sites)]))
    base_tokens, others, other_metric = run_other(asked, prompts, sites)
    logits, base = asked.model.run_with_cache(base_tokens, sites, logits_to_keep=1)
    gradient: dict[str, Tensor] = {}
    for place, weight in points:
        between = torch.lerp(base[embed], others[embed], place)
        _add(gradient, _gradients_with(asked, prompts, base_tokens, embed, between, sites), weight)
    pair = Pair(base, others, gradient, asked.score(logits[:, -1], prompts), other_metric, asked.denoising)
    scores = {
        name: asked.cells(several, lambda site: pair.first_order(as_measured(site)))
        for name, several in asked.sites.items()
    }
    clean, corrupted = pair.clean_and_corrupted
    gap = pair.first_order(embed).flatten(1).sum(1) - (clean - corrupted)
    return BatchScores(scores, clean, corrupted), gap.cpu()[:, None]


def _along_activations(
    asked: Request, prompts: Task, points: Sequence[tuple[float, float]]
) -> tuple[BatchScores, Float[Tensor, "batch site"]]:
    measured = list(dict.fromkeys(map(as_measured, asked.all_sites)))
    base_tokens, others, other_metric = run_other(asked, prompts, measured)
    logits, base = asked.model.run_with_cache(base_tokens, measured, logits_to_keep=1)
    base_metric = asked.score(logits[:, -1], prompts)
    products: dict[Site, Tensor] = {}
    gaps = []
    for site in measured:
        forward = clean_minus_corrupted(base[site], others[site], site, denoising=True)
        gradient: dict[str, Tensor] = {}
        for place, weight in points:
            between = (base[site] + place * forward).to(base[site].dtype)
            _add(gradient, _gradients_with(asked, prompts, base_tokens, site, between, [site]), weight)
        changed = _metric_with(asked, prompts, base_tokens, site, others[site])
        product = forward.mul_(gradient[site])
        gaps.append((product.flatten(1).sum(1) - (changed - base_metric)).cpu())
        products[site] = product if asked.denoising else -product
    scores = {
        name: asked.cells(several, lambda site: products[as_measured(site)]) for name, several in asked.sites.items()
    }
    clean_and_corrupted = (other_metric, base_metric) if asked.denoising else (base_metric, other_metric)
    return BatchScores(scores, *clean_and_corrupted), torch.stack(gaps, dim=1)


def _gradients_with(
    asked: Request,
    prompts: Task,
    tokens: Int[Tensor, "batch pos"],
    replaced: Site,
    value: Tensor,
    sites: Sequence[Site],
) -> Mapping[str, Tensor]:
    """Gradients of the metric at sites, in a run in which the activation of a site is another."""
    with tapped(asked.model.anatomy, [_replacement(replaced, value)]):
        _, _, gradients = asked.model.run_with_gradients(
            tokens, lambda logits: asked.score(logits[:, -1], prompts), sites, logits_to_keep=1
        )
    return gradients


def _metric_with(
    asked: Request, prompts: Task, tokens: Int[Tensor, "batch pos"], replaced: Site, value: Tensor
) -> Float[Tensor, " batch"]:
    """Metric of a run in which the activation of a site is another."""
    with tapped(asked.model.anatomy, [_replacement(replaced, value)]):
        return asked.score(asked.model(tokens, logits_to_keep=1)[:, -1], prompts)


def _replacement(site: Site, value: Tensor) -> Tap:
    return Tap(site, lambda activation, run: value)


def _add(total: dict[str, Tensor], gradients: Mapping[str, Tensor], weight: float) -> None:
    """Add weighted gradients to a total in float32 at least, in place."""
    for site, gradient in gradients.items():
        if site in total:
            total[site].add_(widened(gradient), alpha=weight)
        else:
            total[site] = widened(gradient) * weight
