"""Norms: what they compute, and the LN-rule, under which their scale is a constant.

A norm is y = w·x / s + b with s the root mean square of x (RMSNorm) or, after the mean is taken off, its standard
deviation (LayerNorm). The derivative of s takes the component along x out of every gradient. The LN-rule leaves s out
of the backward pass: C_x = w·C_y / s, centred for a LayerNorm, because taking the mean off is linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.model.anatomy import UnsupportedModel

NormKind = Literal["rms", "layer"]
NormRole = Literal["ln1", "ln2", "attn_post", "mlp_post", "ln_final", "qk", "other"]

_KINDS: tuple[NormKind, ...] = ("rms", "layer")

_EPSILON_NAMES = ("eps", "variance_epsilon", "epsilon")
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Norm:
    """A norm over the last axis of its input."""

    module: nn.Module
    path: str
    role: NormRole
    kind: NormKind
    eps: float
    offset: float
    """What is added to the module's `weight`: 1 in Gemma, 0 elsewhere."""

    def weight(self) -> Tensor | None:
        """The vector w that the normalised input is multiplied by, as it is now; None for a norm without one."""
        weight = getattr(self.module, "weight", None)
        if not isinstance(weight, Tensor):
            return None
        weight = weight.detach()
        return weight if self.offset == 0 else weight.to(_wide(weight.dtype)) + self.offset

    def inverse_scale(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch 1"]:
        """1/s for each row of an input, in float32 at least."""
        wide = x.detach().to(_wide(x.dtype))
        if self.kind == "layer":
            mean_square = wide.var(-1, correction=0, keepdim=True)
        else:
            mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
        return torch.rsqrt(mean_square + self.eps)

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """What the norm makes of x by this formula, in float32 at least."""
        wide = x.to(_wide(x.dtype))
        centred = wide - wide.mean(-1, keepdim=True) if self.kind == "layer" else wide
        y = centred * self.inverse_scale(x)
        weight, bias = self.weight(), getattr(self.module, "bias", None)
        y = y if weight is None else y * weight
        return y + bias.detach() if isinstance(bias, Tensor) else y


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def probed_norm(module: nn.Module, path: str, role: NormRole) -> Norm:
    """The formula of a norm, found by trying each on rows of different size.

    Raises:
        UnsupportedModel: if none of them gives what the module gives.
    """
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_meta:
        raise UnsupportedModel(f"{path}: its weight is not in memory (offloaded), so its formula cannot be checked")
    eps = next((float(getattr(module, name)) for name in _EPSILON_NAMES if hasattr(module, name)), 0.0)
    offsets = (0.0, 1.0) if isinstance(weight, Tensor) else (0.0,)
    try:
        x = _probe_rows(module, weight)
        y = module.forward(x)
        for kind, offset in product(_KINDS, offsets):
            norm = Norm(module, path, role, kind, eps, offset)
            if _agree(norm(x), y):
                return norm
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise UnsupportedModel(f"{path} ({type(module).__name__}) cannot be probed as a norm: {error}") from error
    raise UnsupportedModel(
        f"{path} ({type(module).__name__}) is neither an RMSNorm nor a LayerNorm over its last axis: no rule is known"
    )


def _probe_rows(module: nn.Module, weight: Any) -> Tensor:
    """Rows with a mean, at sizes from where `eps` matters to where it does not."""
    known = isinstance(weight, Tensor)
    shape = tuple(weight.shape) if known else tuple(getattr(module, "normalized_shape", (16,)))
    rows = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    sizes = torch.tensor([1e-3, 1.0, 30.0], dtype=torch.float64).view(3, *[1] * len(shape))
    return (rows * sizes).to(weight) if known else rows * sizes


def _agree(found: Tensor, y: Tensor) -> bool:
    if found.shape != y.shape:
        return False
    error = (found - y).abs().flatten(1).amax(1)
    return bool((error <= _TOLERANCE.get(y.dtype, 1e-5) * y.abs().flatten(1).amax(1).to(error.dtype)).all())


class _FrozenScale(torch.autograd.Function):
    """The output of a norm as it is; backward as if its scale were a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, inverse_scale: Tensor, weight: Tensor | None, centred: bool) -> Tensor:
        ctx.save_for_backward(inverse_scale, weight)
        ctx.centred, ctx.dtype = centred, x.dtype
        # Another tensor over the same numbers: returning `y` itself would make a view that nothing may write to.
        return y.detach()

    @staticmethod
    def backward(ctx: Any, coefficient: Tensor) -> Any:
        inverse_scale, weight = ctx.saved_tensors
        scaled = coefficient * inverse_scale
        if weight is not None:
            scaled = scaled.mul_(weight)
        if ctx.centred:
            scaled = scaled.sub_(scaled.mean(-1, keepdim=True))
        return scaled.to(ctx.dtype), None, None, None, None


def with_frozen_scale(
    norm: Norm, x: Float[Tensor, "*batch width"], y: Float[Tensor, "*batch width"]
) -> Float[Tensor, "*batch width"]:
    """The output `y` of a norm at `x`, with the backward pass of the LN-rule.

    Source: Ali et al. 2022 (arXiv 2202.07304); RelP (arXiv 2508.21258), Table 1.
    """
    result: Tensor = _FrozenScale.apply(x, y, norm.inverse_scale(x), norm.weight(), norm.kind == "layer")
    return result
