"""What the pattern makes of changed queries or keys, in closed form: the Q-fix and K-fix of AtP*.

A gradient says nothing of a softmax that is saturated. So the new pattern is computed exactly, row by row, and only
what comes after it is taken to first order: an effect is Σ (new pattern − pattern) · d metric / d pattern.

Scores are as the softmax sees them (scaled, soft-capped, masked entries −inf), [..., head, query, key]; effects add up
over the query heads that share a key. Everything is computed in float32 at least.

Source: Kramár et al. 2024 (arXiv 2403.00745), Eq. 7, 9 and 10. Checked against patched softmaxes in
tests/patching/test_query_key_fix.py.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def rows_fixed(
    scores: Float[Tensor, "*batch head query key"],
    new_scores: Float[Tensor, "*batch head query key"],
    pattern_gradient: Float[Tensor, "*batch head query key"],
    sink_logits: Float[Tensor, " head"] | None = None,
) -> Float[Tensor, "*batch head query"]:
    """Effect of each row of the pattern becoming that of its new scores: another query, or all keys at once.

    Args:
        scores: those of the base run.
        new_scores: those with the change.
        pattern_gradient: of the metric, at the base run.
        sink_logits: a learned logit a head that takes its share of every row and is then dropped.
    """
    before, masked = _softmax_input(scores, sink_logits)
    after, _ = _softmax_input(new_scores, sink_logits)
    change = (after.softmax(-1) - before.softmax(-1))[..., : scores.shape[-1]]
    return (change * pattern_gradient.to(change.dtype)).masked_fill(masked, 0.0).sum(-1)


def keys_fixed(
    scores: Float[Tensor, "*batch head query key"],
    new_scores: Float[Tensor, "*batch head query key"],
    pattern_gradient: Float[Tensor, "*batch head query key"],
    sink_logits: Float[Tensor, " head"] | None = None,
) -> Float[Tensor, "*batch head key"]:
    """Effect of each key alone becoming another, which changes one score in every row that may attend to it.

    Where score t of a row changes by δ, its share p_t goes to p'_t = sigmoid(log-odds + δ), and what it gains the
    others lose in proportion: the row's effect is (p'_t − p_t) (g_t − mean of g over the others). Costs a few
    elementwise passes over [query, key]; no buffer of three token axes.

    Args:
        scores: as in `rows_fixed`.
        new_scores: scores with all keys new; column t is used for key t alone.
        pattern_gradient: as in `rows_fixed`.
        sink_logits: as in `rows_fixed`.
    """
    n_keys = scores.shape[-1]
    before, masked = _softmax_input(scores, sink_logits)
    after, _ = _softmax_input(new_scores, sink_logits)
    gradient = torch.zeros_like(before)
    gradient[..., :n_keys] = pattern_gradient.masked_fill(masked, 0.0)
    log_odds, mean_of_others = _against_the_others(before, gradient)
    delta = after - before
    gained = torch.where(
        delta > 0,
        torch.sigmoid(log_odds + delta) * torch.sigmoid(-log_odds) * -torch.expm1(-delta),
        torch.sigmoid(log_odds) * torch.sigmoid(-log_odds - delta) * torch.expm1(delta),
    )
    effects = (gained * (gradient - mean_of_others))[..., :n_keys]
    return effects.masked_fill(masked, 0.0).sum(-2)


def _softmax_input(
    scores: Float[Tensor, "*batch head query key"], sink_logits: Float[Tensor, " head"] | None
) -> tuple[Tensor, Tensor]:
    """(Scores with the sink as a last column, where scores are masked)."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    masked = scores.isneginf()
    if sink_logits is None:
        return scores, masked
    sinks = sink_logits.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], dim=-1), masked


def _against_the_others(scores: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """For each entry of a row: its log-odds against all the others, and the mean of the gradient over these.

    Without the largest entry the others are summed anew: one minus a share close to 1 would be rounding error. No other
    entry has more than half of its row.
    """
    largest = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.argmax(-1, keepdim=True), True)
    rest = scores.masked_fill(largest, -torch.inf)
    alone = rest.isneginf().all(-1, keepdim=True)
    share = scores.softmax(-1)
    mean = (share * gradient).sum(-1, keepdim=True)
    rest_mean = (rest.masked_fill(alone, 0.0).softmax(-1) * gradient).sum(-1, keepdim=True)
    log_rest = torch.where(
        largest, rest.logsumexp(-1, keepdim=True), scores.logsumexp(-1, keepdim=True) + torch.log1p(-share)
    )
    mean_of_others = torch.where(largest, rest_mean, (mean - share * gradient) / (1 - share))
    return scores - log_rest, mean_of_others
