"""Attention with secant multipliers: softmax(q·k) v, step by step."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from interp.model.attention import (
    AttentionCall,
    AttentionResult,
    attention_pattern,
    attention_scores,
    by_query_head,
)
from interp.patching.rules.secant import secant_matrix_product
from interp.patching.rules.secant_pairing import KeptRun


class PairedAttention:
    """An attention that keeps what it sees, or whose backward pass is the exact difference to what was kept.

    Scores, soft-cap, mask, softmax and pattern @ v are computed one by one in both runs, so that nothing differs
    between them for the order of a sum.
    """

    def __init__(self, run: KeptRun) -> None:
        self.run = run

    def __call__(self, call: AttentionCall) -> AttentionResult:
        """What one attention module returns: z and the pattern."""
        part, options, n_heads = call.module, call.options, call.query.shape[1]
        here = (call.query, call.key, call.value)
        there = self.run.exchange(part, *here) or here
        query, key, value = (by_query_head(one, n_heads) for one in here)
        query_other, key_other, value_other = (by_query_head(one, n_heads) for one in there)
        scale, cap, sinks = (options.get(name) for name in ("scaling", "softcap", "s_aux"))
        scores = secant_matrix_product(query, key.mT, query_other, key_other.mT)
        scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
        if cap is not None:
            function = partial(soft_cap, cap=cap)
            scores, _ = self.run.elementwise(part, function, scores, function(scores))
        scores = call.tap("attn_scores", scores + _mask(call))
        pattern = self.run.softmax(part, scores, attention_pattern(scores.detach(), sinks), sinks)
        pattern = call.tap("pattern", pattern)
        (pattern_other,) = self.run.exchange(part, pattern) or (pattern,)
        z = secant_matrix_product(pattern.to(value.dtype), value, pattern_other.to(value.dtype), value_other)
        return z.transpose(1, 2).contiguous(), pattern


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Gemma 2's bound on scores and logits: cap·tanh(x / cap)."""
    return torch.tanh(x / cap) * cap


@torch.no_grad()
def _mask(call: AttentionCall) -> Tensor:
    """What the mask adds to the scores: −inf where a query may not attend, a bias if it carries one, else 0."""
    query, key = (torch.zeros_like(one[..., :1]) for one in (call.query, call.key))
    options = {**call.options, "scaling": 1.0, "softcap": None}
    return attention_scores(call.module, query, key, call.mask, **options)
