"""Rows of many variants packed into one matrix, and cut into blocks of whole spans of positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from interp.kernels.suffix_attention import SuffixLayout
from interp.patching.entry import Entry


@dataclass(frozen=True)
class Span:
    """Some consecutive positions of a variant."""

    entry: Entry
    start: int
    stop: int

    @property
    def n_rows(self) -> int:
        """How many positions."""
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class RowBlock:
    """Consecutive spans whose rows pass a layer together."""

    spans: tuple[Span, ...]
    rows: slice
    """Where they are in the packed matrix."""
    first_row: tuple[int, ...]
    """First row of each span, within the block."""
    layout: SuffixLayout
    prompt: Int[Tensor, " row"]
    position: Int[Tensor, " row"]


@dataclass(frozen=True, eq=False)
class Packing:
    """Spans in a fixed order, row after row."""

    spans: tuple[Span, ...]
    prompt: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    first_row: tuple[int, ...]
    """First row of each span, and the number of rows."""

    @property
    def last_rows(self) -> Int[Tensor, " span"]:
        """The last row of each span."""
        return torch.tensor(self.first_row[1:]) - 1

    def rows_of(self, kept: Sequence[int]) -> Int[Tensor, " row"]:
        """The rows of some of the spans, by their places in `spans`."""
        first = self.first_row
        return torch.cat([torch.arange(first[one], first[one + 1]) for one in kept])

    def blocks(self, rows_a_block: int) -> Iterator[RowBlock]:
        """Whole spans, in blocks of about equal size of at most this many rows (or one span)."""
        n_rows = self.first_row[-1]
        even = -(-n_rows // -(-n_rows // rows_a_block))
        begin = 0
        for end in range(1, len(self.spans) + 1):
            rows = self.first_row[end] - self.first_row[begin]
            full = (
                end == len(self.spans) or rows >= even or self.first_row[end + 1] - self.first_row[begin] > rows_a_block
            )
            if full:
                yield self._block(begin, end)
                begin = end

    def _block(self, begin: int, end: int) -> RowBlock:
        spans = self.spans[begin:end]
        rows = slice(self.first_row[begin], self.first_row[end])
        layout = SuffixLayout(
            prompt=tuple(span.entry.prompt for span in spans),
            start=tuple(span.start for span in spans),
            length=tuple(span.n_rows for span in spans),
        )
        first_row = tuple(row - rows.start for row in self.first_row[begin:end])
        return RowBlock(spans, rows, first_row, layout, self.prompt[rows], self.position[rows])


def pack(spans: Sequence[Span]) -> Packing:
    """Pack spans in the order given."""
    starts = np.array([span.start for span in spans])
    lengths = np.array([span.n_rows for span in spans])
    first_row = np.concatenate([[0], np.cumsum(lengths)])
    prompt = np.repeat(np.array([span.entry.prompt for span in spans]), lengths)
    position = np.arange(first_row[-1]) - np.repeat(first_row[:-1] - starts, lengths)
    return Packing(tuple(spans), torch.from_numpy(prompt), torch.from_numpy(position), tuple(first_row.tolist()))
