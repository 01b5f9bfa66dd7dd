"""What one call of a model's attention says of its pattern, from its queries and keys: statistics, or some rows.

Neither holds a pattern, and both work whatever attention implementation the model runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interp.kernels.attention_stats import AttentionStats, attention_stats
from interp.kernels.visible_keys import VisibleKeys
from interp.model import Model, Site
from interp.model.attention import AttentionCall, attention_pattern, attention_scores, implementation_of
from interp.model.points import locate

_MASKS_SAY_ALL = ("eager", "sdpa")
"""Implementations that get a window as a mask tensor, or none where the window hides nothing."""


def attention_modules(model: Model, layers: Iterable[int]) -> dict[int, nn.Module]:
    """The attention module of each layer.

    Raises:
        SiteUnavailable: if the attention of this family cannot be read.
        ValueError: if a layer is out of range.
    """
    return {layer: locate(model.anatomy, Site("rot_q", layer)).module for layer in layers}


def call_stats(
    call: AttentionCall,
    *,
    real: Bool[Tensor, "batch key"] | None = None,
    key_sets: Bool[Tensor, "set batch key"] | None = None,
    exclude: Bool[Tensor, "batch key"] | None = None,
    offsets: Sequence[int] = (),
) -> AttentionStats:
    """`attention_stats` of the queries, keys, mask and options of one call.

    Raises:
        ValueError: if an edit of scores or pattern is in force, which queries and keys know nothing of.
    """
    if not call.is_plain:
        raise ValueError(
            "statistics come from queries and keys, which know nothing of the edits of attention scores or pattern in "
            "force; leave their context, or read the site `pattern`"
        )
    visible = visible_keys(call, real)
    device = call.query.device
    return attention_stats(
        call.query,
        call.key,
        scale=_scale(call),
        causal=visible.causal,
        window=visible.window,
        real=visible.real,
        mask=visible.mask,
        softcap=call.options.get("softcap"),
        sink_logits=call.options.get("s_aux"),
        key_sets=None if key_sets is None else key_sets.to(device),
        exclude=None if exclude is None else exclude.to(device),
        offsets=offsets,
    )


def pattern_rows(
    call: AttentionCall, heads: Sequence[int], rows: Int[Tensor, " row"]
) -> Float[Tensor, "batch head row key"]:
    """Rows of the pattern of some query heads, in float32."""
    rows = rows.to(call.query.device)
    per_kv_head = call.query.shape[1] // call.key.shape[1]
    mask = None if call.mask is None or call.mask.dim() == 2 else call.mask[:, :, rows, : call.key.shape[2]]
    if mask is None:
        mask = visible_keys(call, None).shown(rows, call.query.device)
    sinks = call.options.get("s_aux")
    scores = attention_scores(
        call.module,
        call.query[:, list(heads)][:, :, rows].float(),
        call.key[:, [head // per_kv_head for head in heads]].float(),
        mask if mask.shape[1] == 1 else mask[:, list(heads)],
        scaling=_scale(call),
        softcap=call.options.get("softcap"),
    )
    return attention_pattern(scores, None if sinks is None else sinks[list(heads)])


def visible_keys(call: AttentionCall, real: Bool[Tensor, "batch key"] | None) -> VisibleKeys:
    """Which keys each query of a call may attend to.

    Causal, window and padding as the config says them, if that is what the model's mask says; else that mask.

    Args:
        call: the call.
        real: tokens that are not padding, where the caller knows; a mask may say so too.
    """
    n_queries, n_keys = call.query.shape[2], call.key.shape[2]
    is_causal = call.options.get("is_causal")
    causal = bool(getattr(call.module, "is_causal", True) if is_causal is None else is_causal)
    window = call.options.get("sliding_window")
    if call.mask is None and implementation_of(call.module.config) in _MASKS_SAY_ALL:
        window = None
    if call.mask is not None and call.mask.dim() == 2:
        real = call.mask[:, -n_keys:].bool() if real is None else real & call.mask[:, -n_keys:].bool()
    real = None if real is None else real.to(call.query.device)
    visible = VisibleKeys(n_queries, n_keys, causal=causal, window=window, real=real)
    mask = None if call.mask is None or call.mask.dim() == 2 else call.mask[..., :n_keys]
    if call.mask is None and causal and 1 < n_queries < n_keys:
        # Aligned at the first key, as SDPA does it: further keys are the empty places of a static cache.
        mask = torch.ones(1, 1, n_queries, n_keys, dtype=torch.bool, device=call.query.device).tril()
    if mask is None:
        return visible
    return visible if visible.says(mask) else VisibleKeys(n_queries, n_keys, causal=False, real=real, mask=mask)


def _scale(call: AttentionCall) -> float:
    scale = call.options.get("scaling")
    return float(call.query.shape[-1] ** -0.5 if scale is None else scale)
