"""Edits on packed rows: those of many variants, written into one activation at once.

Rows of a variant are consecutive and stand for consecutive positions of its prompt. Edits that write parts of
one tensor are gathered into one indexed copy; any other edit is applied to its variant's rows by its own tap.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from interp.model.edit import resolve_columns
from interp.model.hooks import Run
from interp.model.sites import SITE_DIMS
from interp.patching.entry import SiteEdit


@dataclass(frozen=True, eq=False)
class PlacedEdit:
    """An edit, and the rows of the packed matrix that its variant owns."""

    edit: SiteEdit
    first_row: int
    start: int
    stop: int
    """The rows are positions `start` to `stop` of its variant."""

    @property
    def rows(self) -> slice:
        """Where they are in the packed matrix."""
        return slice(self.first_row, self.first_row + self.stop - self.start)

    @property
    def run(self) -> Run:
        """How the edit's tap has to read these rows: some positions of a longer prompt, as in decoding."""
        return Run(n_past=self.start, first_key=self.start, decoding=True, lead=(1, self.stop - self.start))


def apply_packed(activation: Tensor, placed: Sequence[PlacedEdit]) -> Tensor:
    """The activation with every edit carried out; the given tensor is not modified.

    Args:
        activation: [1, row, ...] of a site with a position axis.
        placed: edits of that site; those of one variant in the order in which they act.
    """
    edited = activation.clone(memory_format=torch.contiguous_format)
    for edits in _rounds(placed):
        by_axes: dict[tuple[bool, bool], list[PlacedEdit]] = defaultdict(list)
        for one in edits:
            if one.edit.is_plain:
                by_axes[one.edit.edit.heads is not None, one.edit.edit.neurons is not None].append(one)
            else:
                _apply_one(edited, one)
        for group in by_axes.values():
            _write(edited[0], group)
    return edited


def _rounds(placed: Sequence[PlacedEdit]) -> list[list[PlacedEdit]]:
    """First edits of all variants, then second ones, ...: an indexed copy must not write a place twice."""
    rounds: list[list[PlacedEdit]] = []
    seen: dict[int, int] = defaultdict(int)
    for one in placed:
        number = seen[one.first_row]
        seen[one.first_row] += 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(one)
    return rounds


def _apply_one(edited: Tensor, one: PlacedEdit) -> None:
    rows = edited[:, one.rows]
    new = one.edit.tap(rows, one.run)
    if new is not None:
        rows.copy_(new)


def _write(activation: Tensor, group: Sequence[PlacedEdit]) -> None:
    """Copy the chosen parts of each edit's tensor into the rows of its variant, in place.

    Args:
        activation: [row, ...], contiguous.
        group: plain edits that choose along the same axes.
    """
    dims = SITE_DIMS[group[0].edit.site.kind][1:]
    places = [_place(one, dims, activation.shape) for one in group]
    n_chosen = 1 + len(_columns(group[0], dims, activation.shape))
    unit = activation.shape[n_chosen:]
    index = torch.from_numpy(np.concatenate([rows for rows, _ in places])).to(activation.device)
    parts = torch.cat([part.reshape(-1, *unit) for _, part in places])
    activation.view(-1, *unit).index_copy_(0, index, parts.to(activation.device, activation.dtype))


def _place(one: PlacedEdit, dims: Sequence[str], shape: Sequence[int]) -> tuple[NDArray[np.int64], Tensor]:
    """Where an edit writes, as indices into the activation flattened over the axes it chooses along, and what."""
    edit, value = one.edit.edit, one.edit.edit.value
    assert isinstance(value, Tensor)
    positions = list(range(one.start, one.stop))
    if edit.positions is not None:
        positions = [position for position in one.edit.positions if one.start <= position < one.stop]
    index = np.asarray(positions, dtype=np.int64) - one.start + one.first_row
    part = _take(value, 0, positions)
    for axis, columns in _columns(one, dims, shape):
        index = (index[:, None] * shape[axis] + np.asarray(columns, dtype=np.int64)).ravel()
        part = _take(part, axis, columns)
    return index, part


def _columns(one: PlacedEdit, dims: Sequence[str], shape: Sequence[int]) -> list[tuple[int, list[int]]]:
    """The axes after the rows along which an edit chooses, each with the columns chosen."""
    edit, last = one.edit.edit, len(dims) - 1
    found = []
    if "head" in dims and (edit.heads is not None or edit.neurons is not None):
        axis = dims.index("head")
        found.append((axis, resolve_columns(slice(None) if edit.heads is None else edit.heads, shape[axis], "head")))
    if edit.neurons is not None:
        found.append((last, resolve_columns(edit.neurons, shape[last], "neuron")))
    return found


def _take(tensor: Tensor, axis: int, index: list[int]) -> Tensor:
    """Slices along one axis; a view where they are consecutive."""
    if not index or index == list(range(index[0], index[0] + len(index))):
        return tensor.narrow(axis, index[0] if index else 0, len(index))
    return tensor.index_select(axis, torch.tensor(index, device=tensor.device))
