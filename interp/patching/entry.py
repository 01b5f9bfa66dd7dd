"""Where a variant leaves the base run: the first layer and the first position at which its edits change anything.

An edit is held against the base run's own activation. What equals it there changes nothing, unless an edit before it
(in computation order) has changed something already. In a causal model, positions before the first change of any edit
stay as in the base run in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from interp.model import Edit, Model, Site
from interp.model.edit import resolve_positions
from interp.model.hooks import Run, TapFn
from interp.model.sites import SITE_DIMS, SITE_NAMES
from interp.patching.variant import Variant

_ORDER = {kind: index for index, kind in enumerate(SITE_NAMES)}
_ROW_LOCAL = frozenset(SITE_NAMES) - {"embed", "resid_pre", "ln1", "k", "rot_k", "v", "ln_final"}
"""Sites where a change at one position changes nothing at other positions of the same layer."""


@dataclass(frozen=True, eq=False)
class SiteEdit:
    """An edit at one site, with its tap."""

    site: Site
    layer: int
    """The layer in which it acts; the number of layers for the final norm."""
    edit: Edit
    tap: TapFn

    @property
    def positions(self) -> list[int]:
        """The positions chosen, counted from the start; to be asked only where some are."""
        assert isinstance(self.edit.positions, list)
        return self.edit.positions

    @property
    def sees_all_positions(self) -> bool:
        """Whether its result at one position may depend on the others, so that all of them have to be there."""
        return self.edit.fn is not None or isinstance(self.edit.value, str)

    @property
    def is_plain(self) -> bool:
        """Whether it writes parts of one whole activation without a batch axis: these can be written many at once."""
        value = self.edit.value
        return (
            isinstance(value, Tensor) and value.dim() == len(SITE_DIMS[self.site.kind]) - 1 and self.edit.rows is None
        )


@dataclass(frozen=True, eq=False)
class Entry:
    """A variant that changes something: where it leaves the base run, and its edits in computation order."""

    index: int
    """Which of the variants given."""
    prompt: int
    layer: int
    start: int
    """Its first position that differs from the base run."""
    edits: tuple[SiteEdit, ...]
    local: tuple[int, ...] | None = None
    """The only positions that its first layer changes, where that is known; the others leave it as in the base run."""

    @property
    def joins(self) -> int:
        """The layer from which on all its rows are run."""
        return self.layer if self.local is None else self.layer + 1


def site_edits(model: Model, edits: Sequence[Edit], length: int) -> tuple[SiteEdit, ...]:
    """The edits site by site, in computation order; those of one site in the order given.

    Args:
        model: the model.
        edits: edits of one run.
        length: tokens of its prompt: positions are counted from the start from here on.

    Raises:
        ValueError: for a site, layer, head or position that does not exist.
    """
    found = [
        SiteEdit(tap.site, model.n_layers if tap.site.kind == "ln_final" else tap.site.layer or 0, resolved, tap.fn)
        for edit in edits
        for resolved in [_with_positions(edit, model, length)]
        for tap in model.edit_taps(resolved)
    ]
    return tuple(sorted(found, key=lambda one: (one.layer, _ORDER[one.site.kind])))


def _with_positions(edit: Edit, model: Model, length: int) -> Edit:
    """The edit with positions counted from the start; those inside a vision tower are no positions of the prompt."""
    if edit.positions is None or model.site_names(edit.site)[0].tower:
        return edit
    return replace(edit, positions=resolve_positions(edit.positions, length))


def entry_of(
    variant: Variant, index: int, edits: tuple[SiteEdit, ...], base: BaseDifferences, *, whole: bool
) -> Entry | None:
    """Where a variant leaves the base run; None if it never does.

    Args:
        variant: the run.
        index: which of all variants it is.
        edits: its edits, as `site_edits` orders them.
        base: the base run that it may leave.
        whole: let it start at position 0: attention is not causal, or the base run's own edits look at all positions.
    """
    starts = [base.first_position(edit, variant.prompt) for edit in edits]
    first = next((number for number, start in enumerate(starts) if start is not None), None)
    if first is None:
        return None
    left = edits[first:]
    whole = whole or any(edit.sees_all_positions for edit in left)
    start = 0 if whole else min(one for one in starts[first:] if one is not None)
    local = None if whole else _local_positions(left, start)
    return Entry(index, variant.prompt, left[0].layer, start, left, local)


def _local_positions(edits: Sequence[SiteEdit], start: int) -> tuple[int, ...] | None:
    """The positions that the first layer's edits change, if they say so and the layer carries changes no further."""
    first = [one for one in edits if one.layer == edits[0].layer]
    if any(one.site.kind not in _ROW_LOCAL or one.edit.positions is None for one in first):
        return None
    chosen: set[int] = set().union(*(one.positions for one in first))
    return tuple(sorted(position for position in chosen if position >= start))


class BaseDifferences:
    """Holds edits against the activations of the base run.

    Args:
        activations: by site, [prompt, ...]: what the base run has there.
    """

    def __init__(self, activations: Mapping[Site, Tensor]) -> None:
        self._activations = activations
        self._maps: dict[tuple[Site, int, int, bool], NDArray[np.bool_]] = {}

    def first_position(self, edit: SiteEdit, prompt: int) -> int | None:
        """The first position (query, for scores and pattern) that the edit changes; None if it changes nothing."""
        changed = self._plain(edit, prompt) if edit.is_plain else self._any(edit, prompt)
        positions = changed.nonzero()[0]
        return int(positions[0]) if len(positions) else None

    def _plain(self, edit: SiteEdit, prompt: int) -> NDArray[np.bool_]:
        """Booleans over positions, looked up in a map that edits with the same tensor share."""
        value = edit.edit.value
        assert isinstance(value, Tensor)
        # Neurons and keys are chosen one by one; the columns of a head or a stream never are, save with `neurons`.
        keep_last = edit.edit.neurons is not None or "key" in SITE_DIMS[edit.site.kind]
        key = (edit.site, prompt, id(value), keep_last)
        if key not in self._maps:
            here = self._activations[edit.site][prompt]
            differs = value.to(here.device, here.dtype) != here
            self._maps[key] = (differs if keep_last else differs.any(-1)).cpu().numpy()
        return _changed_positions(self._maps[key], edit)

    def _any(self, edit: SiteEdit, prompt: int) -> NDArray[np.bool_]:
        here = self._activations[edit.site][prompt][None]
        new = edit.tap(here, Run())
        dims = SITE_DIMS[edit.site.kind]
        axis = dims.index("query" if "query" in dims else "position")
        if new is None:
            return np.zeros(here.shape[axis], dtype=bool)
        others = [dim for dim in range(here.dim()) if dim != axis]
        differs: NDArray[np.bool_] = torch.amax(new != here, dim=others).cpu().numpy()
        return differs


def _changed_positions(differs: NDArray[np.bool_], edit: SiteEdit) -> NDArray[np.bool_]:
    """A map of differences without batch axis, narrowed to the edit's region and reduced to positions."""
    dims = SITE_DIMS[edit.site.kind][1:]
    last = edit.edit.keys if "key" in dims else edit.edit.neurons
    chosen = {"head": edit.edit.heads, dims[-1]: last}
    axis = dims.index("query" if "query" in dims else "position")
    for dim, name in enumerate(dims[: differs.ndim]):
        index = chosen.get(name)
        if index is not None:
            differs = differs[(slice(None),) * dim + ([index] if isinstance(index, int) else index,)]
    others = tuple(dim for dim in range(differs.ndim) if dim != axis)
    changed = np.asarray(differs.any(axis=others))
    if edit.edit.positions is not None:
        within = np.zeros_like(changed)
        within[edit.positions] = True
        changed &= within
    return changed
