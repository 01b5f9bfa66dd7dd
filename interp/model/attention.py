"""Inside attention, for every family at once: a function registered with transformers' `AttentionInterface`.

While sites inside attention are wanted, the configs of the modules concerned name the implementation `interp`. Its
function

1. hands q and k (after QK-norm and rotary) to the taps of `rot_q` and `rot_k`;
2. if `attn_scores` or `pattern` are tapped, recomputes them in plain PyTorch (scale, soft-cap, mask, learned sink
   logits) and hands them to their taps;
3. lets the model's own implementation (eager, SDPA, ...) compute z from q, k and v, unless a tap changed scores or
   pattern: then z = pattern @ v.

Steps 2 and 3 can be wrapped (`attention_wrapped`): relevance rules change their backward pass, the sweep engine what
the rows of a packed batch attend to.

So observing changes no number, and the model keeps its own implementation. Taps belong to one thread: a forward pass in
another thread, or of another model that shares the config, goes straight to the original implementation.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from interp.model.tower import modeling_module

IMPLEMENTATION = "interp"
_FULL_MASK_IMPLEMENTATIONS = ("eager", "sdpa")


@dataclass(frozen=True)
class AttentionTap:
    """What to do with one tensor inside attention: `fn` returns a replacement, or None to leave it."""

    kind: str
    fn: Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class AttentionCall:
    """What one attention module hands to its attention function, q and k after QK-norm, rotary and their taps."""

    module: nn.Module
    query: Tensor
    """[batch, head, query, d_head]"""
    key: Tensor
    """[batch, kv_head, key, d_head]"""
    value: Tensor
    """[batch, kv_head, key, d_head]"""
    mask: Tensor | None
    """As the model's own implementation gets it: booleans or additive floats, None where that needs none."""
    options: Mapping[str, Any]
    """`scaling`, `softcap`, `sliding_window`, `s_aux` (learned sink logits), ..., as far as the family has them."""
    taps: Sequence[AttentionTap] = ()
    inner: AttentionWrapper | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the model's own attention follows: no tap of scores or pattern, no further wrapper."""
        return self.inner in (None, _attend) and not any(tap.kind in ("attn_scores", "pattern") for tap in self.taps)

    def run(self) -> AttentionResult:
        """What the next wrapper makes of this call; without one, the model's own attention with its taps."""
        return _attend(self) if self.inner is None else self.inner(self)

    def tap(self, kind: str, activation: Tensor) -> Tensor:
        """An activation after the taps of its kind: for wrappers that compute scores and pattern themselves."""
        return _apply(self.taps, kind, activation)


AttentionResult = tuple[Tensor, Tensor | None]
"""(z [batch, query, head, d_head], the pattern if it was computed)."""
AttentionWrapper = Callable[[AttentionCall], AttentionResult]


class _Taps(threading.local):
    """The taps and wrappers of this thread by attention module, in order of registration."""

    def __init__(self) -> None:
        self.by_module: dict[nn.Module, list[AttentionTap]] = defaultdict(list)
        self.wrappers: dict[nn.Module, list[AttentionWrapper]] = defaultdict(list)


_taps = _Taps()
_lock = threading.RLock()
_original: dict[int, tuple[Any, str, int]] = {}
"""id of a config in use -> (the config, its own implementation, how many contexts hold it)."""


@contextmanager
def attention_taps(taps: Sequence[tuple[nn.Module, AttentionTap]]) -> Iterator[None]:
    """Apply taps inside the attention modules for the duration of the context, in this thread."""
    needs_mask = any(tap.kind in ("attn_scores", "pattern") for _, tap in taps)
    with _held((module for module, _ in taps), needs_mask=needs_mask), _listed(_taps.by_module, taps):
        yield


@contextmanager
def attention_wrapped(wrappers: Mapping[nn.Module, AttentionWrapper]) -> Iterator[None]:
    """Let a function stand before the attention of each module, in this thread; `call.run()` goes on to the original.

    Contexts nest: the innermost one is called first. The taps of rotated q and k act before any wrapper.
    """
    with _held(wrappers, needs_mask=False), _listed(_taps.wrappers, wrappers.items()):
        yield


@contextmanager
def _held(modules: Iterable[nn.Module], *, needs_mask: bool) -> Iterator[None]:
    """Name our implementation in the configs of the modules."""
    held: list[Any] = []
    try:
        for config in {id(module.config): module.config for module in modules}.values():
            _hold(config, needs_mask=needs_mask)
            held.append(config)
        yield
    finally:
        for config in held:
            _release(config)


@contextmanager
def _listed(by_module: dict[nn.Module, list[Any]], entries: Iterable[tuple[nn.Module, Any]]) -> Iterator[None]:
    entries = list(entries)
    try:
        for module, entry in entries:
            by_module[module].append(entry)
        yield
    finally:
        for module, entry in entries:
            # By identity: two equal taps are two taps.
            left = [other for other in by_module.get(module, []) if other is not entry]
            by_module[module] = left
            if not left:
                del by_module[module]


def _hold(config: Any, *, needs_mask: bool) -> None:
    with _lock:
        _, own, count = _original.get(id(config), (config, config._attn_implementation, 0))
        if needs_mask and own not in _FULL_MASK_IMPLEMENTATIONS:
            raise ValueError(
                f"scores and pattern need the attention mask, which {own!r} does not build; "
                "load the model with attn_implementation='sdpa' or 'eager' to read them"
            )
        _original[id(config)] = (config, own, count + 1)
        # The private field: the public setter would also push the value into the sub-configs of other towers.
        config._attn_implementation_internal = IMPLEMENTATION


def _release(config: Any) -> None:
    with _lock:
        _, own, count = _original[id(config)]
        if count == 1:
            config._attn_implementation_internal = own
            del _original[id(config)]
        else:
            _original[id(config)] = (config, own, count - 1)


def implementation_of(config: Any) -> str:
    """The attention implementation that the user set, also while taps are in place."""
    held = _original.get(id(config))
    return held[1] if held else config._attn_implementation


def _tapped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> AttentionResult:
    taps = _taps.by_module.get(module, ())
    call = AttentionCall(module, query, key, value, attention_mask, kwargs, taps)
    if taps:
        rot_q = call.tap("rot_q", query.transpose(1, 2)).transpose(1, 2)
        call = replace(call, query=rot_q, key=call.tap("rot_k", key.transpose(1, 2)).transpose(1, 2))
    wrapped: AttentionWrapper = _attend
    for wrapper in _taps.wrappers.get(module, ()):
        wrapped = _around(wrapper, wrapped)
    return wrapped(call)


def _around(wrapper: AttentionWrapper, inner: AttentionWrapper) -> AttentionWrapper:
    return lambda call: wrapper(replace(call, inner=inner))


def _attend(call: AttentionCall) -> AttentionResult:
    """The model's own attention, or pattern @ v where a tap changed scores or pattern."""
    if any(tap.kind in ("attn_scores", "pattern") for tap in call.taps):
        scores = attention_scores(call.module, call.query, call.key, call.mask, **call.options)
        new_scores = call.tap("attn_scores", scores)
        pattern = attention_pattern(new_scores, call.options.get("s_aux"))
        new_pattern = call.tap("pattern", pattern)
        if new_scores is not scores or new_pattern is not pattern:
            z = torch.matmul(new_pattern.to(call.value.dtype), by_query_head(call.value, call.query.shape[1]))
            return z.transpose(1, 2).contiguous(), new_pattern
    eager = modeling_module(call.module, "eager_attention_forward")
    original = AttentionInterface().get_interface(implementation_of(call.module.config), eager)
    return original(call.module, call.query, call.key, call.value, call.mask, **call.options)


def _apply(taps: Sequence[AttentionTap], kind: str, activation: Tensor) -> Tensor:
    for tap in taps:
        if tap.kind == kind:
            new = tap.fn(activation)
            activation = activation if new is None else new
    return activation


def attention_scores(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> Tensor:
    """Scores as the softmax sees them: scaled, soft-capped, masked entries -inf.

    Args:
        module: the attention module; says whether attention is causal where there is no mask tensor.
        query: [batch, head, query, d_head].
        key: [batch, kv_head, key, d_head].
        attention_mask: additive floats or booleans (True = may attend), [batch, 1 or head, query, key]; None as SDPA
            takes it.

    Returns:
        [batch, head, query, key] in the dtype of `query`.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, by_query_head(key, query.shape[1]).transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    n_queries, n_keys = scores.shape[-2:]
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if not causal or n_queries == 1:
            return scores
        # Aligned at the first key, as SDPA does it: further keys are the empty places of a static cache.
        allowed = torch.ones(n_queries, n_keys, dtype=torch.bool, device=scores.device).tril()
    else:
        attention_mask = attention_mask[..., :n_keys]
        if attention_mask.dtype == torch.bool:
            allowed = attention_mask
        else:
            # Masked entries carry the dtype's lowest value; anything else is a bias.
            allowed = attention_mask > torch.finfo(attention_mask.dtype).min / 2
            scores = scores + torch.where(allowed, attention_mask, 0.0)
    return scores.masked_fill(~allowed, float("-inf"))


def attention_pattern(scores: Tensor, sink_logits: Tensor | None = None) -> Tensor:
    """Softmax over keys in float32 at least; a row with nothing to attend to is all zero.

    Args:
        scores: [batch, head, query, key].
        sink_logits: one learned logit a head [head] that takes its share of every row and is then dropped (gpt-oss), so
            that rows sum to less than 1.
    """
    logits = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sink_logits is not None:
        sink = sink_logits.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], dim=-1)
    pattern = torch.softmax(logits, dim=-1)[..., : scores.shape[-1]]
    empty = torch.isneginf(scores).all(dim=-1, keepdim=True)
    return pattern.masked_fill(empty, 0.0).to(scores.dtype)


def by_query_head(keys: Tensor, n_heads: int) -> Tensor:
    """Repeat each key/value head for its group of query heads: [batch, kv_head, ...] -> [batch, head, ...]."""
    per_group = n_heads // keys.shape[1]
    return keys if per_group == 1 else keys.repeat_interleave(per_group, dim=1)


def _delegated_mask(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """The mask that the model's own implementation would get."""
    return AttentionMaskInterface()[implementation_of(config)](*args, config=config, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _tapped_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _delegated_mask)
