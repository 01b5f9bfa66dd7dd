"""Rows of many variants packed into one matrix, and cut into blocks of whole variants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from interp.kernels.suffix_attention import SuffixLayout
from interp.patching.entry import Entry


@dataclass(frozen=True, eq=False)
class RowBlock:
    """Consecutive variants whose rows pass a layer together."""

    entries: tuple[Entry, ...]
    rows: slice
    """Where they are in the packed matrix."""
    layout: SuffixLayout
    prompt: Int[Tensor, " row"]
    position: Int[Tensor, " row"]


@dataclass(frozen=True, eq=False)
class Packing:
    """Variants in a fixed order, each with the rows from its start to the end of its prompt."""

    entries: tuple[Entry, ...]
    length: int
    """Tokens of every prompt."""
    prompt: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    first_row: tuple[int, ...]
    """First row of each variant, and the number of rows."""

    @property
    def n_rows(self) -> int:
        """Rows of the packed matrix."""
        return self.first_row[-1]

    @property
    def base_rows(self) -> Int[Tensor, " row"]:
        """Where each row is in the base run's [prompt * pos] rows."""
        return self.prompt * self.length + self.position

    @property
    def last_rows(self) -> Int[Tensor, " variant"]:
        """The row of each variant's last position."""
        return torch.tensor(self.first_row[1:]) - 1

    def rows_of(self, kept: Sequence[int]) -> Int[Tensor, " row"]:
        """The rows of some of the variants, by their places in `entries`."""
        first = self.first_row
        return torch.cat([torch.arange(first[one], first[one + 1]) for one in kept])

    def blocks(self, rows_a_block: int) -> Iterator[RowBlock]:
        """Whole variants, up to about this many rows a block."""
        begin = 0
        for end in range(1, len(self.entries) + 1):
            full = end == len(self.entries) or self.first_row[end + 1] - self.first_row[begin] > rows_a_block
            if full:
                yield self._block(begin, end)
                begin = end

    def _block(self, begin: int, end: int) -> RowBlock:
        entries = self.entries[begin:end]
        rows = slice(self.first_row[begin], self.first_row[end])
        layout = SuffixLayout(
            prompt=tuple(entry.prompt for entry in entries),
            start=tuple(entry.start for entry in entries),
            length=tuple(self.length - entry.start for entry in entries),
        )
        return RowBlock(entries, rows, layout, self.prompt[rows], self.position[rows])


def pack(entries: Sequence[Entry], length: int) -> Packing:
    """Pack variants of prompts of this length, in the order given."""
    starts = np.array([entry.start for entry in entries])
    lengths = length - starts
    first_row = np.concatenate([[0], np.cumsum(lengths)])
    prompt = np.repeat(np.array([entry.prompt for entry in entries]), lengths)
    position = np.arange(first_row[-1]) - np.repeat(first_row[:-1] - starts, lengths)
    return Packing(
        tuple(entries), length, torch.from_numpy(prompt), torch.from_numpy(position), tuple(first_row.tolist())
    )
