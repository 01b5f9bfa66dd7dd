"""Runs that keep activations as nodes of the autograd graph, and the gradients of a metric at them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from interp.model.capture import gradient_taps
from interp.model.hooks import tapped
from interp.model.sites import Site
from interp.model.tower import Anatomy


def forward_on_path(
    anatomy: Anatomy, sites: Sequence[Site], forward: Callable[[], Tensor]
) -> tuple[Tensor, dict[Site, Tensor]]:
    """Logits of a forward pass, and activations of the sites as nodes of the graph that leads to them."""
    on_path: dict[Site, Tensor] = {}
    with torch.enable_grad(), tapped(anatomy, gradient_taps(sites, anatomy, on_path)):
        return forward(), on_path


def gradients_at(values: Tensor, on_path: Mapping[Site, Tensor]) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    """Activations and the gradient of the sum of `values` at each, zero where they do not depend on it."""
    gradients = torch.autograd.grad(values.sum(), list(on_path.values()), allow_unused=True)
    kept = {site: tensor.detach() for site, tensor in on_path.items()}
    filled = {
        site: torch.zeros_like(tensor) if gradient is None else gradient
        for (site, tensor), gradient in zip(kept.items(), gradients, strict=True)
    }
    return kept, filled
