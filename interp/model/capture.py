"""Taps that keep activations: as plain copies for a cache, or on the autograd path for gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from interp.model.hooks import Run, Tap
from interp.model.points import locate
from interp.model.sites import SITE_DIMS, Site
from interp.model.tower import Anatomy

Positions = int | slice | Sequence[int] | None


def capture_taps(
    sites: Sequence[Site],
    store: dict[Site, Tensor],
    *,
    positions: Positions = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tap]:
    """Taps that put each site's activation into `store`.

    An activation that covers the whole of its storage is kept by reference, anything smaller is copied, so that a cache
    never holds on to memory that was not asked for.
    """

    def keep(site: Site) -> Callable[[Tensor, Run], None]:
        def tap(activation: Tensor, run: Run) -> None:
            if site in store:
                raise ValueError(
                    f"{site} is computed more than once in this run (several images packed?); run one at a time"
                )
            kept = activation.detach()
            if positions is not None:
                kept = _at_positions(kept, site, positions, run)
            kept = kept.to(device=device, dtype=dtype)
            store[site] = kept.clone() if kept.untyped_storage().nbytes() > kept.nbytes else kept

        return tap

    return [Tap(site, keep(site)) for site in sites]


def _at_positions(activation: Tensor, site: Site, positions: Positions, run: Run) -> Tensor:
    dims = SITE_DIMS[site.kind]
    dim = dims.index("query" if "query" in dims else "position")
    n_columns = activation.shape[dim]
    if run.n_padding is None:
        columns = _in_prompt(positions, n_columns)
        return activation.index_select(dim, torch.tensor(columns, device=activation.device))
    rows = []
    for row, n_padding in enumerate(run.n_padding.tolist()):
        columns = [column + n_padding for column in _in_prompt(positions, n_columns - n_padding)]
        rows.append(activation[row].index_select(dim - 1, torch.tensor(columns, device=activation.device)))
    if len({row.shape for row in rows}) > 1:
        raise ValueError(
            "a slice of positions gives prompts of different length different numbers of positions; list them instead"
        )
    return torch.stack(rows)


def _in_prompt(positions: Positions, length: int) -> list[int]:
    if isinstance(positions, slice):
        return list(range(*positions.indices(length)))
    chosen = [positions] if isinstance(positions, int) else [int(one) for one in positions or ()]
    for one in chosen:
        if not -length <= one < length:
            raise ValueError(f"position {one} is outside the prompt (length {length}); positions run 0..{length - 1}")
    return [one % length for one in chosen]


def gradient_taps(sites: Sequence[Site], anatomy: Anatomy, on_path: dict[Site, Tensor]) -> list[Tap]:
    """Taps that put each site's activation, as a node of the autograd graph that leads to the output, into `on_path`.

    Returning the activation makes the model go on with it. If nothing before it asks for gradients (frozen parameters),
    the graph starts there.
    """
    points = {site: locate(anatomy, site) for site in sites}

    def keep(site: Site) -> Callable[[Tensor, Run], Tensor]:
        def tap(activation: Tensor, run: Run) -> Tensor:
            if not activation.requires_grad:
                activation = activation.detach().clone().requires_grad_()
            elif points[site].in_place or site.kind in ("attn_scores", "pattern"):
                # A new node: the written tensor must not be its own source, and inside attention a new object means
                # "use it".
                activation = activation.clone()
            on_path[site] = activation
            return activation.clone() if points[site].overwritten_later else activation

        return tap

    return [Tap(site, keep(site)) for site in sites]
