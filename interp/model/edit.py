"""Interventions as frozen values: one change to one site, at chosen positions, heads, neurons and rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from interp.model.hooks import Run, Tap
from interp.model.sites import SITE_DIMS, Site, SitePattern

Index = int | slice | Sequence[int]


@dataclass(frozen=True, eq=False)
class Edit:
    """One change to one site; exactly one of `value`, `add`, `scale` and `fn` is given.

    >>> Edit("blocks.9.attn.hook_z", heads=[6], value=0.0)

    Args:
        site: a site name, short form or pattern; a pattern edits every site that it names.
        value: a number, a tensor that broadcasts to the whole activation (such as a cached one, of which the chosen
            positions and heads are taken), or "mean": the mean of the run's own activation over prompts and positions.
        add: number or tensor to add.
        scale: number or tensor to multiply by.
        fn: function of the whole activation returning a new one; the chosen region is taken from it.
        positions: positions of the prompt (padding not counted; negative from its end). None: all. For scores and
            pattern these are query positions.
        heads: head indices (key/value heads for k, v and rot_k). None: all.
        neurons: indices into the last axis. None: all.
        keys: key positions, for scores and pattern only. None: all.
        rows: prompts of the batch. None: all.
    """

    site: SitePattern
    value: float | Tensor | str | None = None
    add: float | Tensor | None = None
    scale: float | Tensor | None = None
    fn: Callable[[Tensor], Tensor] | None = None
    positions: Index | None = None
    heads: Index | None = None
    neurons: Index | None = None
    keys: Index | None = None
    rows: Index | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("value", "add", "scale", "fn") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"an Edit takes exactly one of value, add, scale and fn; got {', '.join(given) or 'none'}")
        if isinstance(self.value, str) and self.value != "mean":
            raise ValueError(f"value={self.value!r}: the only value given by name is 'mean'")

    def taps(self, sites: Sequence[Site], n_heads: dict[str, int]) -> list[Tap]:
        """The taps that carry out this edit.

        Args:
            sites: what `site` names in the model.
            n_heads: number of heads by site kind, to check `heads` before the first forward pass.

        Raises:
            ValueError: for an unknown site, an axis the site does not have, or a head out of range.
        """
        for site in sites:
            self._check_axes(site, n_heads)
        return [Tap(site, self._apply_at(site)) for site in sites]

    def _check_axes(self, site: Site, n_heads: dict[str, int]) -> None:
        dims = SITE_DIMS[site.kind]
        if self.heads is not None:
            if "head" not in dims:
                raise ValueError(f"{site} has no head axis; its axes are {', '.join(dims)}")
            resolve_columns(self.heads, n_heads[site.tower + site.kind], "head")
        if self.keys is not None and "key" not in dims:
            raise ValueError(f"{site} has no key axis; its axes are {', '.join(dims)}")
        if self.neurons is not None and "key" in dims:
            raise ValueError(f"{site} has no neuron axis; its axes are {', '.join(dims)}")

    def _apply_at(self, site: Site) -> Callable[[Tensor, Run], Tensor | None]:
        dims = SITE_DIMS[site.kind]

        def apply(activation: Tensor, run: Run) -> Tensor | None:
            region = self._region(activation, dims, run, site)
            if region is None:
                return None
            new = self._new(activation, dims, run, _first_column(site, run))
            if new is None:
                return None
            return torch.where(region, new, activation)

        return apply

    def _region(self, activation: Tensor, dims: tuple[str, ...], run: Run, site: Site) -> Tensor | None:
        """Where the edit acts, as booleans that broadcast to the activation; None if nowhere in this pass."""
        region = torch.ones([1] * len(dims), dtype=torch.bool, device=activation.device)
        if self.rows is not None:
            region = region & _one_axis(self.rows, activation, dims, "batch", "row")
        if self.heads is not None:
            region = region & _one_axis(self.heads, activation, dims, "head", "head")
        if self.neurons is not None:
            region = region & _one_axis(self.neurons, activation, dims, dims[-1], "neuron")
        if self.positions is not None:
            axis = "query" if "query" in dims else "position"
            region = region & _position_axis(self.positions, activation, dims, axis, run, _first_column(site, run))
        if self.keys is not None:
            region = region & _position_axis(self.keys, activation, dims, "key", run, 0)
        return region if bool(region.any()) else None

    def _new(self, activation: Tensor, dims: tuple[str, ...], run: Run, first_column: int) -> Tensor | None:
        """The whole activation as the edit would have it; None if its tensor says nothing about this pass."""
        if self.fn is not None:
            return self.fn(activation.clone())
        if isinstance(self.value, str):
            return _own_mean(activation, dims, run)
        operand = next(one for one in (self.value, self.add, self.scale) if one is not None)
        if isinstance(operand, Tensor):
            operand = operand.to(activation.device, activation.dtype)
            if first_column:
                axis = "query" if "query" in dims else "position"
                windowed = _window(operand, activation, dims.index(axis), first_column)
                if windowed is None:
                    return None
                operand = windowed
            _check_broadcast(operand, activation)
        if self.value is not None:
            return torch.as_tensor(operand, dtype=activation.dtype, device=activation.device)
        return activation + operand if self.add is not None else activation * operand


def _first_column(site: Site, run: Run) -> int:
    """The position of the activation's first column (query, for scores and pattern)."""
    # The keys of rot_k cover the whole sequence, cached ones too.
    return run.first_key if site.kind == "rot_k" else run.n_past


def resolve_columns(index: Index, length: int, what: str) -> list[int]:
    """An index as a list of non-negative columns.

    Raises:
        ValueError: if one is out of range.
    """
    if isinstance(index, slice):
        return list(range(*index.indices(length)))
    chosen = [index] if isinstance(index, int) else [int(one) for one in index]
    for one in chosen:
        if not -length <= one < length:
            raise ValueError(f"{what} {one} is out of range; {what}s run 0..{length - 1}")
    return [one % length for one in chosen]


def _one_axis(index: Index, activation: Tensor, dims: tuple[str, ...], axis: str, what: str) -> Tensor:
    dim = dims.index(axis)
    length = activation.shape[dim]
    chosen = torch.zeros(length, dtype=torch.bool, device=activation.device)
    chosen[resolve_columns(index, length, what)] = True
    return chosen.view([length if one == dim else 1 for one in range(len(dims))])


def _position_axis(index: Index, activation: Tensor, dims: tuple[str, ...], axis: str, run: Run, n_past: int) -> Tensor:
    """Chosen positions as booleans over (batch, axis).

    Positions count within each prompt, so padding shifts them, and those in a KV cache are not in the activation.
    """
    dim, batch = dims.index(axis), dims.index("batch")
    n_columns = activation.shape[dim]
    padding = [0] if run.n_padding is None else run.n_padding.tolist()
    chosen = torch.zeros(len(padding), n_columns, dtype=torch.bool, device=activation.device)
    for row, n_padding in enumerate(padding):
        length = n_past + n_columns - n_padding
        for position in resolve_positions(index, length, check=not run.decoding):
            column = position + n_padding - n_past
            if 0 <= column < n_columns:
                chosen[row, column] = True
    shape = [1] * len(dims)
    shape[batch], shape[dim] = len(padding), n_columns
    return chosen.view(shape)


def resolve_positions(index: Index, length: int, *, check: bool = True) -> list[int]:
    """An index as positions of a prompt of this length, counted from its start.

    Args:
        check: refuse positions outside the prompt; later passes of a generation may bring those.

    Raises:
        ValueError: if one is out of range and `check` is set.
    """
    if isinstance(index, slice):
        return list(range(*index.indices(length)))
    chosen = [index] if isinstance(index, int) else [int(one) for one in index]
    for one in chosen:
        if check and not -length <= one < length:
            raise ValueError(f"position {one} is outside the prompt (length {length}); positions run 0..{length - 1}")
    return [one if one >= 0 else one + length for one in chosen]


def _own_mean(activation: Tensor, dims: tuple[str, ...], run: Run) -> Tensor:
    if "position" not in dims:
        raise ValueError("value='mean' is a mean over prompts and positions; scores and pattern have no such mean")
    if run.n_past:
        raise ValueError(
            "value='mean' has no meaning for one decoded token; pass the mean as a tensor to edit during generation"
        )
    if run.n_padding is None:
        return activation.float().mean((0, 1), keepdim=True).to(activation.dtype).expand_as(activation)
    real = torch.arange(activation.shape[1], device=activation.device) >= run.n_padding[:, None].to(activation.device)
    return activation[real].float().mean(0).to(activation.dtype).expand_as(activation)


def _window(operand: Tensor, activation: Tensor, dim: int, n_past: int) -> Tensor | None:
    """The part of a cached tensor for the positions of this pass; None if they lie beyond it."""
    if operand.dim() < activation.dim() - dim or operand.shape[dim - activation.dim()] == 1:
        return operand
    axis = dim - activation.dim()
    if n_past >= operand.shape[axis]:
        return None
    return operand.narrow(axis, n_past, min(activation.shape[dim], operand.shape[axis] - n_past))


def _check_broadcast(operand: Tensor, activation: Tensor) -> None:
    try:
        fits = torch.broadcast_shapes(operand.shape, activation.shape) == activation.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"a tensor of shape {tuple(operand.shape)} does not broadcast to the activation {tuple(activation.shape)}; "
            "give the whole activation (positions and heads are taken from it) or one vector"
        )
