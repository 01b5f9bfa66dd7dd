"""The cells of a patching sweep: every combination of the axes kept, as edits of one or more sites."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from interp.model import Edit, Site
from interp.model.sites import SITE_DIMS

Axis = Literal["layer", "position", "head", "query", "key", "neuron"]
AXES: tuple[Axis, ...] = ("layer", "position", "head", "query", "key", "neuron")
"""The order of axes in every result."""

_EDIT_FIELD = {"position": "positions", "query": "positions", "head": "heads", "key": "keys", "neuron": "neurons"}

Cell = tuple[tuple[Site, dict[str, int]], ...]
"""The sites that a cell patches together, each with the index along every axis kept within the site."""


def grid(sites: Sequence[Site], axes: Sequence[Axis], shape: Sequence[int]) -> tuple[list[int], list[Cell]]:
    """All cells of a sweep, the last axis running fastest.

    Args:
        sites: the layers of one kind of site, in order; one site if it has no layer.
        axes: axes kept, in the order of `AXES`. Without "layer", all sites are patched together.
        shape: shape of the site's activation, batch axis included.

    Returns:
        (lengths of the axes kept, cells).
    """
    dims = SITE_DIMS[sites[0].kind]
    together = [(site,) for site in sites] if "layer" in axes else [tuple(sites)]
    inner = [axis for axis in axes if axis != "layer"]
    lengths = [shape[dims.index(axis)] for axis in inner]
    cells: list[Cell] = [
        tuple((site, dict(zip(inner, place, strict=True))) for site in group)
        for group in together
        for place in itertools.product(*(range(length) for length in lengths))
    ]
    return ([len(sites)] if "layer" in axes else []) + lengths, cells


def cell_edit(site: Site, place: Mapping[str, int | Sequence[int]], value: Tensor) -> Edit:
    """The edit that writes the part of `value` (a whole activation) at this place, or at several along an axis."""
    index = {_EDIT_FIELD[axis]: [one] if isinstance(one, int) else list(one) for axis, one in place.items()}
    return Edit(site, value=value, **index)  # type: ignore[arg-type]
