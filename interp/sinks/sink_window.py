"""A KV cache of the first tokens and the last ones, with keys as they are before rotary.

The rows of the cache are sequences, its columns the tokens kept, in order; what the columns hold is the same in every
layer and is decided once a pass (`Columns`). In every pass

1. the new tokens are put behind the columns, and the queries attend to all of them (causally among the new);
2. then each row is cut to its sinks and its last tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

Rope = Literal["cache", "original"]


@dataclass(frozen=True)
class SinkWindow:
    """Which tokens a streamed run keeps, and at which positions it sees them."""

    sinks: int = 4
    """First tokens of the sequence that are never dropped; 0: a plain window."""
    recent: int = 252
    """Last tokens that are kept."""
    rope: Rope = "cache"
    """Positions counted in the cache (the published way), or those that the tokens have in the text."""

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ValueError: if a size or the way of counting makes no sense.
        """
        if self.sinks < 0 or self.recent < 1:
            raise ValueError(f"a cache keeps sinks >= 0 and recent >= 1 tokens; got {self.sinks} and {self.recent}")
        if self.rope not in ("cache", "original"):
            raise ValueError(f"rope is 'cache' or 'original'; got {self.rope!r}")

    @property
    def size(self) -> int:
        """Tokens kept after a pass."""
        return self.sinks + self.recent

    @property
    def name(self) -> str:
        """`4+252`, with the way of counting where it is not the usual one."""
        return f"{self.sinks}+{self.recent}" + (" original" if self.rope == "original" else "")


class Columns:
    """What the columns of a cache hold: the same in every layer.

    A row with fewer tokens than others has its empty columns on the left.

    Args:
        windows: one for every row, or a single one for all.
        device: of the cache.
    """

    def __init__(self, windows: Sequence[SinkWindow], device: torch.device) -> None:
        self._windows = windows
        self._sinks = torch.tensor([one.sinks for one in windows], device=device)
        self._recent = torch.tensor([one.recent for one in windows], device=device)
        self._original = torch.tensor([one.rope == "original" for one in windows], device=device)
        self.n_seen = 0
        """Tokens that have passed, kept or not."""
        self.n_kept = 0
        """Columns between passes."""
        self._n_new = 0
        self._n_empty = torch.zeros(0, dtype=torch.long, device=device)
        self._positions: Tensor | None = None
        self._kept_columns: Tensor | None = None

    def begin_pass(self, n_rows: int, n_new: int, attention_mask: Tensor | None) -> Bool[Tensor, "row column"] | None:
        """Put new tokens behind the columns.

        Args:
            n_rows: sequences.
            n_new: tokens of this pass.
            attention_mask: [row, position], of at least the new tokens; None: all are to be seen.

        Returns:
            Which of the columns, old and new, hold a token; None if all do.

        Raises:
            ValueError: if the new tokens do not fit, or the mask hides more than padding on the left.
        """
        if self.n_seen == 0:
            self._n_empty = torch.zeros(n_rows, dtype=torch.long, device=self._sinks.device)
        if n_rows != len(self._n_empty):
            raise ValueError(f"the cache holds {len(self._n_empty)} sequences; this pass brings {n_rows}")
        smallest = min(self._windows, key=lambda one: one.recent)
        if n_new > smallest.recent and self.n_seen + n_new > smallest.size:
            raise ValueError(
                f"{n_new} tokens at once would push out the last {smallest.recent} whole: feed at most "
                f"{smallest.recent} a pass (generate does with prefill_chunk_size={smallest.recent})"
            )
        self._n_new = n_new
        length = self.n_kept + n_new
        column = torch.arange(length, device=self._sinks.device)
        filled = column >= self._n_empty[:, None]
        if attention_mask is not None:
            filled[:, self.n_kept :] &= attention_mask[:, -n_new:].to(filled.device).bool()
        self._n_empty = (filled.cumsum(-1) == 0).sum(-1)
        if not torch.equal(filled, column >= self._n_empty[:, None]):
            raise ValueError("a streamed run takes prompts of one length or padding on the left; the mask hides others")
        self._kept_columns = self._columns_to_keep(length)
        return None if bool(filled.all()) else filled

    def _columns_to_keep(self, length: int) -> Int[Tensor, "row kept"] | None:
        """The columns that stay after this pass, on the left any column at all where a row has fewer; None: all."""
        n_filled = length - self._n_empty
        kept = torch.minimum(n_filled, self._sinks + self._recent)
        n_columns = int(kept.max())
        if n_columns == length:
            return None
        from_right = torch.arange(n_columns - 1, -1, -1, device=kept.device)
        sink = self._n_empty[:, None] + (self._sinks + self._recent)[:, None] - 1 - from_right
        stays = (from_right < self._recent[:, None]) | (n_filled == kept)[:, None]
        return torch.where(stays, length - 1 - from_right, sink).clamp(min=0)

    def rotary_positions(self, new: Int[Tensor, "*axes #row new"]) -> Int[Tensor, "*axes row column"]:
        """Positions of all columns, old and new, by which keys are rotated; the new ones' are those of the queries.

        Args:
            new: positions of the new tokens in the text, as the model counts them.

        Raises:
            ValueError: if an image has positions of several axes, which have no counterpart in the cache.
        """
        n_rows = len(self._n_empty)
        if self._positions is None or self._positions.shape[-1] != self.n_kept + self._n_new:
            new = new.expand(*new.shape[:-2], n_rows, self._n_new)
            self._positions = new if self._positions is None else torch.cat([self._positions, new], dim=-1)
        positions = self._positions
        if bool(self._original.all()):
            return positions
        if positions.dim() > 2 and not bool((positions == positions[:1]).all()):
            raise ValueError(
                "the pieces of an image have positions of several axes, which cannot be counted in the cache; use "
                "rope='original'"
            )
        column = torch.arange(positions.shape[-1], device=positions.device)
        in_cache = (column - self._n_empty[:, None]).clamp(min=0)
        return torch.where(self._original[:, None], positions, in_cache)

    def cut(self, states: Float[Tensor, "row head column d_head"]) -> Float[Tensor, "row head kept d_head"]:
        """Keys or values of the columns that stay."""
        if self._kept_columns is None:
            return states
        rows = torch.arange(len(states), device=states.device)[:, None]
        return states[rows, :, self._kept_columns.to(states.device)].transpose(1, 2)

    def end_pass(self) -> None:
        """Cut the columns to those that stay."""
        self.n_seen += self._n_new
        length = self.n_kept + self._n_new
        self.n_kept = length
        if self._kept_columns is None:
            return
        self.n_kept = self._kept_columns.shape[-1]
        kept = torch.minimum(length - self._n_empty, self._sinks + self._recent)
        self._n_empty = self.n_kept - kept
        if self._positions is not None:
            index = self._kept_columns.expand(*self._positions.shape[:-1], -1)
            self._positions = self._positions.gather(-1, index)


class _Layer(DynamicLayer):
    """Keys before rotary, and values, of one layer."""

    is_croppable = False

    def __init__(self, columns: Columns) -> None:
        super().__init__()
        self._columns = columns

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All columns and the new ones for this pass; what stays is kept."""
        keys, values = super().update(key_states, value_states)
        self.keys, self.values = self._columns.cut(keys), self._columns.cut(values)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns in this pass, the first one's number): the model's mask is over columns."""
        return self._columns.n_kept + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens that have passed: positions in the text go on from there."""
        return self._columns.n_seen

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: dropped tokens are gone."""
        raise NotImplementedError("a streamed cache cannot go back: decode without an assistant model")


class StreamingCache(Cache):
    """A KV cache of sinks and last tokens for `n_layers` layers, of use only inside `interp.sinks.streaming`."""

    def __init__(self, n_layers: int, columns: Columns) -> None:
        super().__init__(layers=[_Layer(columns) for _ in range(n_layers)])
        self.columns = columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The column of the first new token."""
        return self.columns.n_kept

    def reset(self) -> None:
        """Not possible: start with a new cache, as every `generate` does."""
        raise NotImplementedError("a streamed cache is not used twice: let every generate make its own")
