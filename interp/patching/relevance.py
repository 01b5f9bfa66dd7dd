"""Relevance patching (RelP): attribution patching with the coefficients of layer-wise relevance propagation.

1. Run the other prompts; then the base prompts under relevance rules, whose backward pass gives each activation its
   propagation coefficient C instead of its gradient.
2. A score is Σ (clean − corrupted activation) · C.

The rules leave out of the backward pass what makes gradients mislead about finite changes: the derivative of norms, and
the curvature of activation functions and gates.

Source: RelP (arXiv 2508.21258).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import xarray as xr

from interp.metrics import Metric
from interp.model import Model
from interp.patching.activation import Direction
from interp.patching.cells import Axis
from interp.patching.estimate import Request, first_order_scores, request
from interp.patching.rules.relevance import prepared_rules, rules_label
from interp.patching.verify import verified_top
from interp.tasks import Task


def relevance_patching(
    model: Model,
    task: Task,
    *,
    site: str,
    by: Sequence[Axis] = ("layer", "position"),
    rules: str | Iterable[str] = "relp",
    direction: Direction = "denoise",
    metric: str | Metric | None = None,
    normalised: bool = True,
    per_prompt: bool = False,
    verify: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Relevance patching (RelP): the effect of patching each cell, from one backward pass under relevance rules.

    A score is Σ (clean − corrupted activation) · propagation coefficient at the base run. As published, the rules do
    not reach inside attention and leave biases their share, so scores do not add up to the metric's difference.

    Costs two forward passes and one backward pass.

    Args:
        model: the model.
        task: clean and corrupted prompts with answers.
        site: a kind of site ("z", "resid_pre", "mlp_out", ...).
        by: the axes kept; scores are summed over the others, which `activation_patching` patches together.
        rules: a preset or rules from `interp.patching.rules.RULES`. "relp": norms, activation functions and gated
            products, as published; "relp+ah": the attention pattern a constant as well; "qk": for models with norms of
            q and k; "attnlrp"; "cp-lrp".
        direction: the base run is the corrupted one for "denoise", the clean one for "noise".
        metric: name in `interp.metrics.METRICS` or a function, with a gradient; the task's own by default.
        normalised: divide by the mean over prompts of metric(clean) − metric(corrupted).
        per_prompt: keep a leading `prompt` axis instead of averaging over prompts.
        verify: re-compute this many entries of largest magnitude exactly: see `verify_top`.
        batch_size: prompts a pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        An array with the dims, sign and scale of `activation_patching`; the attr `rules` names the rules.

    Raises:
        ValueError: for an axis that the site does not have, a position axis over prompts of several lengths, a metric
            without a gradient, or an unknown or contradictory choice of rules.
        UnsupportedModel: if a part of the model has no rule, naming its dotted path.
        NotImplementedError: for rules inside attention where transformers implements it outside the AttentionInterface.
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
    return verified_top(asked, relevance_scores(asked, rules), verify)[site]


def relevance_scores(asked: Request, rules: str | Iterable[str] = "relp") -> dict[str, xr.DataArray]:
    """`relevance_patching` of all sites asked for, in one backward pass a batch; by the name of the site."""
    names = rules if isinstance(rules, str) else frozenset(rules)
    within = prepared_rules(asked.model, names)
    return first_order_scores(asked, method="relevance_patching", within=within, attrs={"rules": rules_label(names)})
