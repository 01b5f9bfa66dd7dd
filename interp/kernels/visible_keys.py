"""Which keys each query may attend to: a few parameters where they say it, a mask read in blocks where they do not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_BLOCK = 256
"""Queries whose mask is looked at at once."""


@dataclass(frozen=True)
class VisibleKeys:
    """Causal or not, a window, padding, a mask: a query attends to the keys that all of them leave it.

    Queries are the last rows: query i is at position `n_keys - n_queries + i`.
    """

    n_queries: int
    n_keys: int
    causal: bool = True
    window: int | None = None
    real: Bool[Tensor, "batch key"] | None = None
    """Tokens that are not padding; None: all."""
    mask: Tensor | None = None
    """Booleans (True = may attend) or floats to add to the scores, [batch or 1, head or 1, query, key]."""

    def check(self, n_batch: int, n_heads: int) -> None:
        """Raise ValueError where window or mask make no sense."""
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: a query sees at least itself, so a window is 1 or more")
        if self.mask is not None:
            allowed = ((1, n_batch), (1, n_heads), (self.n_queries,), (self.n_keys,))
            if self.mask.dim() != 4 or any(n not in ns for n, ns in zip(self.mask.shape, allowed, strict=True)):
                wanted = f"[1 or {n_batch}, 1 or {n_heads}, {self.n_queries}, {self.n_keys}]"
                raise ValueError(f"mask is {list(self.mask.shape)}; with these queries and keys it must be {wanted}")

    def positions(self, rows: slice | Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        """Positions of some queries."""
        which = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        return which + (self.n_keys - self.n_queries)

    def shown(self, rows: slice | Int[Tensor, " row"], device: torch.device) -> Bool[Tensor, "#batch #head row key"]:
        """Where some queries may attend to a key."""
        return ~self._hidden(slice(None), rows, slice(0, self.n_keys), device)

    def says(self, mask: Tensor) -> bool:
        """Whether this is what a mask tensor says, so that it need not be read."""
        for start in range(0, self.n_queries, _BLOCK):
            rows = slice(start, min(start + _BLOCK, self.n_queries))
            part = mask[..., rows, :]
            shown = self.shown(rows, mask.device)
            if mask.dtype != torch.bool:
                shown = torch.where(shown, 0.0, torch.finfo(mask.dtype).min).to(mask.dtype)
            if not torch.equal(shown.expand_as(part), part):
                return False
        return True

    def span(self, rows: slice) -> slice:
        """The keys outside which none of these queries attends to anything, as far as causal and window say."""
        first, last = self.n_keys - self.n_queries + rows.start, self.n_keys - self.n_queries + rows.stop - 1
        low = 0 if self.window is None else max(0, first - self.window + 1)
        high = last + 1 if self.causal else self.n_keys
        return slice(low, high if self.window is None else min(high, last + self.window))

    def distance(self, rows: slice, keys: slice, *, like: Tensor) -> Float[Tensor, "row key"]:
        """|query - key| in tokens."""
        queries = self.positions(rows).to(like)
        return (queries[:, None] - torch.arange(keys.start, keys.stop).to(like)).abs_()

    def hide(
        self, scores: Float[Tensor, "batch head row key"], batch: slice, rows: slice, keys: slice, *, value: float
    ) -> None:
        """Add what the mask adds to these scores and set those of hidden keys to a value, in place."""
        if self.mask is not None and self.mask.dtype != torch.bool:
            scores += self._mask(batch, rows, keys).clamp(min=value)
        # Before the first query's own key, causal attention hides nothing.
        plain = self.window is None and self.real is None and self.mask is None
        border = min(keys.stop, int(self.positions(rows)[0])) if plain and self.causal else keys.start
        if not plain or self.causal:
            hidden = self._hidden(batch, rows, slice(border, keys.stop), scores.device)
            scores[..., border - keys.start :].masked_fill_(hidden, value)

    def counts(
        self, exclude: Bool[Tensor, "batch key"] | None, n_batch: int, n_heads: int, device: torch.device
    ) -> tuple[Int[Tensor, "batch head query"], Int[Tensor, "batch head key"]]:
        """(keys that each query may attend to, without the excluded ones; queries that may attend to each key)."""
        n_keys, n_queries = self._counted(exclude) if self.mask is None else self._counted_in_mask(exclude)
        return (
            n_keys.to(device).expand(n_batch, n_heads, self.n_queries),
            n_queries.to(device).expand(n_batch, n_heads, self.n_keys),
        )

    def _counted(self, exclude: Bool[Tensor, "batch key"] | None) -> tuple[Tensor, Tensor]:
        """Counts without a mask, by cumulative sums; [batch or 1, 1, ...]."""
        keys, queries = torch.arange(self.n_keys), self.positions(slice(0, self.n_queries))
        first = self.n_keys - self.n_queries
        far = self.n_keys if self.window is None else self.window - 1
        real = torch.ones(1, self.n_keys, dtype=torch.bool) if self.real is None else self.real
        kept = real if exclude is None else real & ~exclude
        behind = 0 if self.causal else far
        n_keys = _between(kept, (queries - far).clamp(min=0), (queries + behind + 1).clamp(max=self.n_keys))
        n_queries = _between(real, (keys - behind).clamp(min=first), (keys + far + 1).clamp(first, self.n_keys))
        return (n_keys * real[:, first:])[:, None], (n_queries * real)[:, None]

    def _counted_in_mask(self, exclude: Bool[Tensor, "batch key"] | None) -> tuple[Tensor, Tensor]:
        """Counts with a mask, block by block; [batch or 1, head or 1, ...]."""
        n_keys, n_queries = [], torch.zeros((), dtype=torch.int64, device=self._device)
        for start in range(0, self.n_queries, _BLOCK):
            rows = slice(start, min(start + _BLOCK, self.n_queries))
            shown = self.shown(rows, self._device)
            n_queries = n_queries + shown.sum(-2)
            n_keys.append((shown if exclude is None else shown & ~exclude[:, None, None]).sum(-1))
        return torch.cat(n_keys, dim=-1), n_queries

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.mask is None else self.mask.device

    def _mask(self, batch: slice, rows: slice | Tensor, keys: slice) -> Tensor:
        assert self.mask is not None
        return (self.mask if len(self.mask) == 1 else self.mask[batch])[..., rows, keys]

    def _hidden(
        self, batch: slice, rows: slice | Tensor, keys: slice, device: torch.device
    ) -> Bool[Tensor, "#batch #head row key"]:
        """Where a query may not attend to a key."""
        queries = self.positions(rows).to(device)
        ahead = torch.arange(keys.start, keys.stop, device=device) - queries[:, None]
        hidden = ahead > 0 if self.causal else torch.zeros_like(ahead, dtype=torch.bool)
        if self.window is not None:
            hidden |= ahead.abs() >= self.window
        hidden = hidden[None, None]
        if self.real is not None:
            real = self.real[batch]
            hidden = hidden | ~real[:, None, None, keys] | ~real[:, None, queries, None]
        if self.mask is not None:
            mask = self._mask(batch, rows, keys)
            # Masked entries carry the dtype's lowest value; anything else is a bias.
            shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            hidden = hidden | ~shown
        return hidden


def _between(
    marked: Bool[Tensor, "batch key"], low: Int[Tensor, " row"], high: Int[Tensor, " row"]
) -> Int[Tensor, "batch row"]:
    """How many keys are marked in [low, high)."""
    before = torch.nn.functional.pad(marked.long().cumsum(-1), (1, 0))
    return (before[:, high.to(marked.device)] - before[:, low.to(marked.device)]).clamp(min=0)
