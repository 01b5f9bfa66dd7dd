"""Gated products act(g)·u, and the rules for products.

The Half-rule gives each factor half of the product's relevance: C_a = ½·u·C and C_u = ½·a·C. Both halves come from
scaling what arrives at the product. CP-LRP instead stops at the gate, so that the other factor gets everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp.patching.rules.activations import Activation


@dataclass(frozen=True)
class GatedProduct:
    """A gated MLP: `down(activation(gate) * up)`. The product is the input of `down`."""

    path: str
    """Of the module that holds the four."""
    activation: Activation
    up: nn.Module
    """The module whose output is u, or ends in it."""
    fused: bool
    """Whether `up` also computes the gate: its output is [gate, u]."""
    down: nn.Module


class _Scaled(torch.autograd.Function):
    """The same numbers; backward times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.detach()

    @staticmethod
    def backward(ctx: Any, coefficient: Tensor) -> Any:
        return coefficient * ctx.factor, None


def with_scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` with every gradient that comes back through it multiplied by `factor`."""
    result: Tensor = _Scaled.apply(x, factor)
    return result
