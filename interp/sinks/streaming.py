"""StreamingLLM: decode without end with a KV cache that keeps the attention sinks and the last tokens.

Keys are cached before rotary; in every pass all of them are rotated anew by their positions in the cache, and the query
stands right behind the last of them, so that no distance is longer than the cache.

**The rolled cache is approximate by design.** Until a token is dropped, a streamed run is the dense run, to rounding.
After that it is not a dense run over the tokens that are left: the keys and values of every layer but the first were
computed when their tokens still attended to what has been dropped since.

Source: Xiao et al. 2024 (arXiv 2309.17453). Checked against a plain loop over lists of unrotated keys, and against
dense runs of every family, in tests/sinks/test_streaming.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from jaxtyping import Int
from torch import Tensor, nn
from transformers import Cache

from interp.model import Model
from interp.sinks.rotary import check_rotary, rotated_late
from interp.sinks.sink_window import Columns, Rope, SinkWindow, StreamingCache


@contextmanager
def streaming(model: Model, *, sinks: int = 4, recent: int = 252, rope: Rope = "cache") -> Iterator[None]:
    """Let every run with a KV cache inside the context keep the first `sinks` tokens and the last `recent` only.

    `model.generate` is used as ever, with any of transformers' options but assistant models; each call starts with an
    empty cache of its own. Prompts of one length or padded on the left. A run that is given no cache (a plain call of
    the model) stays dense.

    * A prompt longer than `recent` is fed in chunks of `recent` tokens (transformers' `prefill_chunk_size`). Within a
    chunk a token attends to the cache as it was before the chunk and to the chunk's earlier tokens: up to `recent` - 1
    keys more than if it were fed by itself. Until `sinks + recent` tokens have passed there is no difference.
    * A layer with a sliding window keeps the same tokens as any other, and its window is counted in the cache: it
    reaches over columns, whatever `rope` is.
    * Layers without rotary (SmolLM3) and learned sink logits (gpt-oss) are as ever.
    * Sites `rot_q` and `rot_k` of a run inside are the rotated ones, if they are read or edited inside this context (a
    context of edits goes inside this one). Positions of keys there, and in scores and pattern, are columns of the
    cache; at all other sites they count from the start of the text.

    Args:
        model: the model.
        sinks: first tokens (padding left out) that are never dropped; 0 is a plain window.
        recent: last tokens that are kept.
        rope: positions counted in the cache, or those that the tokens have in the text.

    Raises:
        UnsupportedModel: if this family has no rotary position embeddings, or applies them in a way that is not known.
        ValueError: if a size makes no sense.
    """
    with streamed_rows(model, [SinkWindow(sinks, recent, rope)]), _prefilled_in_chunks(model.hf, recent):
        yield


@contextmanager
def streamed_rows(model: Model, windows: Sequence[SinkWindow]) -> Iterator[None]:
    """`streaming` with a window of its own for each row of the batch (or a single one for all), without chunks."""
    check_rotary(model.tower)
    stream = _Stream(model, windows)
    handles = [
        model.hf.register_forward_pre_hook(stream.before_pass, with_kwargs=True),
        model.hf.register_forward_hook(stream.after_pass),
    ]
    try:
        with rotated_late(model.tower, stream.positions_of_keys):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Stream:
    """Puts a streaming cache in the place of the one that a run begins with, and keeps its columns in step."""

    def __init__(self, model: Model, windows: Sequence[SinkWindow]) -> None:
        self._model = model
        self._windows = windows
        self._owner = threading.get_ident()
        self._replaced: WeakKeyDictionary[Cache, StreamingCache] = WeakKeyDictionary()
        self._columns: Columns | None = None

    def before_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand the model the streaming cache, and a mask over its columns."""
        if threading.get_ident() != self._owner:
            return None
        self._columns = None
        given = kwargs.get("past_key_values")
        if given is None:
            return None
        cache = self._cache_for(given)
        self._columns = cache.columns
        new = args[0] if args else kwargs.get("input_ids")
        new = kwargs["inputs_embeds"] if new is None else new
        filled = cache.columns.begin_pass(new.shape[0], new.shape[1], kwargs.get("attention_mask"))
        return args, kwargs | {"past_key_values": cache, "attention_mask": filled}

    def after_pass(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Let go of what has been dropped."""
        if threading.get_ident() == self._owner and self._columns is not None:
            self._columns.end_pass()
            self._columns = None

    def positions_of_keys(self, new: Int[Tensor, "*axes #row new"]) -> Tensor | None:
        """Positions by which keys are rotated in this pass; None in a dense one."""
        return None if self._columns is None else self._columns.rotary_positions(new)

    def _cache_for(self, given: Cache) -> StreamingCache:
        if isinstance(given, StreamingCache):
            return given
        if given not in self._replaced:
            if given.get_seq_length() > 0:
                raise ValueError(
                    f"the KV cache already holds {given.get_seq_length()} tokens, their keys rotated; begin inside the "
                    "context, with an empty one"
                )
            columns = Columns(self._windows, self._model.device)
            self._replaced[given] = StreamingCache(self._model.n_layers, columns)
        return self._replaced[given]


@contextmanager
def _prefilled_in_chunks(hf: Any, size: int) -> Iterator[None]:
    """Have `generate` feed prompts in chunks of at most `size` tokens, unless it is told another size."""
    config = getattr(hf, "generation_config", None)
    if config is None:
        yield
        return
    own = config.prefill_chunk_size
    config.prefill_chunk_size = size if own is None else min(own, size)
    try:
        yield
    finally:
        config.prefill_chunk_size = own
