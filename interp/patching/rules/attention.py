"""Rules inside attention: what comes back to q, k, v and the pattern.

Softmax(q·k) v is a softmax between two products. The AH-rule takes the pattern as a constant, so that nothing comes
back to q and k. AttnLRP shares both products evenly (v a half, q and k a quarter) and keeps the gradient of the
softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from interp.model.attention import AttentionCall, AttentionResult, AttentionTap, AttentionWrapper
from interp.patching.rules.gates import with_scaled_gradient


def detached_pattern(is_active: Callable[[], bool]) -> AttentionWrapper:
    """Attention with a constant pattern: C_v = Aᵀ C_z, nothing for q and k.

    Source: Ali et al. 2022 (arXiv 2202.07304), the AH-rule.
    """

    def attend(call: AttentionCall) -> AttentionResult:
        if not is_active():
            return call.run()
        # A tap may have put a leaf for gradients in the place of scores or pattern: it is cut off after the tap.
        cuts = [
            AttentionTap(kind, _detached)
            for kind in ("attn_scores", "pattern")
            if any(t.kind == kind for t in call.taps)
        ]
        return replace(call, query=call.query.detach(), key=call.key.detach(), taps=[*call.taps, *cuts]).run()

    return attend


def _detached(activation: Tensor) -> Tensor | None:
    return activation.detach() if activation.requires_grad else None


def scaled_gradients(is_active: Callable[[], bool], *, query_key: float, value: float) -> AttentionWrapper:
    """Attention whose gradients for q and k, and for v, are multiplied by these factors.

    Source: AttnLRP (arXiv 2402.05602), the uniform rule; RelP's Half-rule on q·k alone for `query_key` ½, `value` 1.
    """

    def attend(call: AttentionCall) -> AttentionResult:
        if not is_active():
            return call.run()
        return replace(
            call,
            query=_scaled(call.query, query_key),
            key=_scaled(call.key, query_key),
            value=_scaled(call.value, value),
        ).run()

    return attend


def _scaled(x: Tensor, factor: float) -> Tensor:
    return with_scaled_gradient(x, factor) if factor != 1 and x.requires_grad else x
