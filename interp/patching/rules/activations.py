"""Activation functions: which ones a rule can be given for, and the Identity-rule.

The Identity-rule hands on relevance unchanged through an elementwise f: R_x = R_y, that is C_x = f(x)/x · C_y, the
slope of the line through the origin (f′(0) at x = 0). It makes sense for functions that are 0 at 0 and grow no faster
than linearly; the probe refuses the others (squared ReLU, sigmoid, ...).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp.model.anatomy import UnsupportedModel


@dataclass(frozen=True)
class Activation:
    """A module that applies one function to every number."""

    module: nn.Module
    path: str
    slope_at_zero: float
    """f′(0), the limit of f(x)/x."""


def probed_activation(module: nn.Module, path: str) -> Activation:
    """A module as an activation function, checked on a grid in float64.

    Raises:
        UnsupportedModel: if it is not elementwise, not 0 at 0, or grows faster than linearly.
    """
    name = f"{path} ({type(module).__name__})"
    try:
        reason = _why_no_rule(module)
        slope = 0.0 if reason else _slope_at_zero(module)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise UnsupportedModel(f"{name} cannot be probed as an activation function: {error}") from error
    if reason:
        raise UnsupportedModel(f"{name} {reason}: no rule is known")
    return Activation(module, path, slope)


@torch.no_grad()
def _why_no_rule(module: nn.Module) -> str:
    """What a module lacks of an activation function with a rule; "" if nothing."""
    grid = torch.cat([torch.linspace(-12, 12, 97, dtype=torch.float64), torch.tensor([0.0, 1e3, -1e3, 1e4, -1e4])])
    given = grid.clone()
    values = module.forward(given)
    if not torch.equal(given, grid):
        return "overwrites its input"
    # One number at a time, along either axis: a softmax is found out, too.
    alone = [module.forward(grid[:, None])[:, 0], module.forward(grid[None])[0]]
    same_shape = {one.shape for one in (values, *alone)} == {grid.shape}
    if not same_shape or not all(torch.allclose(one, values, rtol=1e-9, atol=1e-12) for one in alone):
        return "is not a function of single numbers"
    if float(values[grid == 0].abs().max()) != 0:
        return "is not 0 at 0, so that f(x)/x is no slope"
    near, far = float(values[-4:-2].abs().max()), float(values[-2:].abs().max())
    return "grows faster than linearly, so that f(x)/x hands on the wrong share" if far > 10.5 * near else ""


@torch.enable_grad()
def _slope_at_zero(module: nn.Module) -> float:
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(module.forward(zero).sum(), zero)
    return float(slope)


class _SlopeThroughOrigin(torch.autograd.Function):
    """The output of an activation function as it is; backward with the slope of the line through the origin."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, slope_at_zero: float) -> Tensor:
        # 0/0 is where the limit stands in. A NaN that came in is in `y` as well, where the run is checked for it.
        ctx.save_for_backward(torch.div(y, x).nan_to_num_(nan=slope_at_zero))
        return y.detach()

    @staticmethod
    def backward(ctx: Any, coefficient: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return coefficient * slope, None, None


def with_identity_rule(x: Tensor, y: Tensor, slope_at_zero: float) -> Tensor:
    """The output `y` of an activation function at `x`, with the backward pass of the Identity-rule.

    Source: RelP (arXiv 2508.21258), Table 1; AttnLRP (arXiv 2402.05602), Eq. 9.
    """
    result: Tensor = _SlopeThroughOrigin.apply(x, y, slope_at_zero)
    return result
