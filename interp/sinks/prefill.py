"""What is found in a prompt, kept for the tokens that are decoded after it, and forgotten when the next prompt comes.

A pass with an empty KV cache (or none) starts a sequence. Later passes see the tokens after it: their first column is
position `run.n_past` of the sequence, and the keys they attend to are those of the whole sequence, of its last window,
or of a cache with room to spare.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.model.hooks import Run


class PromptKeys:
    """Keys marked while a prompt is run. One a layer: every layer has its own."""

    def __init__(self) -> None:
        self._marked: Tensor | None = None
        self._n_seen = 0

    def find(self, marked: Bool[Tensor, "batch head prompt_pos"]) -> None:
        """Put the marks of a new prompt in place of those of the last one."""
        self._marked = marked

    def on_keys(self, run: Run, pattern: Tensor) -> Bool[Tensor, "batch head key"]:
        """The marks over the key axis of this pass's pattern [batch, head, query, key].

        Raises:
            ValueError: if the prompt of this sequence was not seen.
        """
        marked, n_queries = self._marked, pattern.shape[2]
        if marked is None or len(marked) != len(pattern) or run.n_past > self._n_seen:
            raise ValueError(
                f"{run.n_past} tokens of this sequence are in the KV cache, and their sinks are not known: run the "
                "prompt inside the context too"
            )
        self._n_seen = run.n_past + n_queries
        return columns(marked, first_key(run, pattern), pattern.shape[3])


def first_key(run: Run, pattern: Tensor) -> int:
    """The position of the first key of a pattern [batch, head, query, key]: not 0 where a cache keeps a window only."""
    return max(0, run.n_past + pattern.shape[2] - pattern.shape[3])


def columns(
    marked: Bool[Tensor, "*axes pos"], first: int, length: int, *, beyond: Bool[Tensor, "*axes"] | None = None
) -> Bool[Tensor, "*axes column"]:
    """Marks over positions, at `length` columns from position `first` on.

    Args:
        marked: over the positions of a prompt.
        first: position of the first column.
        length: number of columns.
        beyond: what columns after the prompt are; None: not marked.
    """
    inside = marked[..., first : first + length]
    rest = length - inside.shape[-1]
    after = torch.zeros_like(marked[..., 0]) if beyond is None else beyond
    return torch.cat([inside, after[..., None].expand(*after.shape, rest)], dim=-1)
