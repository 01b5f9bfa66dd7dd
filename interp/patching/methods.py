"""Every estimate by name, and several sites at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial

import xarray as xr

from interp.metrics import Metric
from interp.model import Model
from interp.patching.activation import Direction
from interp.patching.atp_star import atp_star, atp_star_scores, qk_fixed_patching, qk_fixed_scores
from interp.patching.attribution import (
    attribution_patching,
    attribution_scores,
    gradient_times_input,
    gradient_times_input_scores,
    normgrad,
    normgrad_scores,
)
from interp.patching.cells import Axis
from interp.patching.estimate import Request, request
from interp.patching.integrated import integrated_gradients, integrated_scores
from interp.patching.relevance import relevance_patching, relevance_scores
from interp.patching.secant import secant_patching, secant_scores
from interp.patching.verify import verified_top
from interp.tasks import Task

_PRESETS = ("relp+ah", "attnlrp", "cp-lrp")

METHODS: dict[str, Callable[..., xr.DataArray]] = {
    "atp": attribution_patching,
    "atp+qk": qk_fixed_patching,
    "atp*": atp_star,
    "relp": relevance_patching,
    **{name: partial(relevance_patching, rules=name) for name in _PRESETS},
    "relp+qk": partial(relevance_patching, rules="qk"),
    "secant": secant_patching,
    "ig": integrated_gradients,
    "ig-activation": partial(integrated_gradients, path="activation"),
    "gradxinput": gradient_times_input,
    "normgrad": normgrad,
}
"""Estimates of `activation_patching` by short name; all are called alike."""

_SCORES: dict[str, Callable[[Request], dict[str, xr.DataArray]]] = {
    "atp": attribution_scores,
    "atp+qk": qk_fixed_scores,
    "atp*": atp_star_scores,
    "relp": relevance_scores,
    **{name: partial(relevance_scores, rules=name) for name in _PRESETS},
    "relp+qk": partial(relevance_scores, rules="qk"),
    "secant": secant_scores,
    "ig": integrated_scores,
    "ig-activation": partial(integrated_scores, path="activation"),
    "gradxinput": gradient_times_input_scores,
    "normgrad": normgrad_scores,
}


def estimates(
    model: Model,
    task: Task,
    *,
    sites: Sequence[str],
    method: str = "relp",
    by: Sequence[Axis] = ("layer", "position"),
    direction: Direction = "denoise",
    metric: str | Metric | None = None,
    normalised: bool = True,
    per_prompt: bool = False,
    verify: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> dict[str, xr.DataArray]:
    """One method at several sites, which share its forward and backward passes.

    Args:
        model: the model.
        task: clean and corrupted prompts with answers.
        sites: kinds of site, all with the axes in `by`.
        method: a name in `METHODS`, with that method's default options.
        by: as in `attribution_patching`.
        direction: as in `attribution_patching`.
        metric: as in `attribution_patching`.
        normalised: as in `attribution_patching`.
        per_prompt: as in `attribution_patching`.
        verify: re-compute this many entries of each site exactly.
        batch_size: as in `attribution_patching`.
        progress: as in `attribution_patching`.

    Returns:
        By the names in `sites`, what the method returns for each.

    Raises:
        ValueError: for an unknown method, and as the method.
    """
    scores = _SCORES[method_named(method)]
    asked = request(
        model,
        task,
        sites=sites,
        by=by,
        direction=direction,
        metric=metric,
        normalised=normalised,
        per_prompt=per_prompt,
        batch_size=batch_size,
        progress=progress,
    )
    return verified_top(asked, scores(asked), verify)


def method_named(name: str) -> str:
    """The name, if there is such a method.

    Raises:
        ValueError: if not; near names are offered.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name!r} is not an estimate{hint} (estimates: {', '.join(METHODS)})")
    return name
