"""What a norm does apart from its scale: a norm is linear once its scale is known, whatever its family.

Every norm in use here maps x to (centre(x) · gain) / scale(x) + bias, where centring is there in LayerNorm and not in
RMSNorm, and gain is 1 + weight in some families. Instead of a table of families, gain, bias and centring are read off
the model's own module by running a float32 copy of it on two probes, and checked on whatever is linearised.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

TOLERANCE = 1e-3
_LARGE = 1e3  # probes so large that the epsilon in a norm's scale does not show


@dataclass(frozen=True)
class LinearNorm:
    """The linear part of a norm, float32; the identity for a model that has no norm in this place."""

    module: nn.Module | None
    """A float32 copy of the norm."""
    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool

    def apply(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """centre(x) · gain: the norm without scale and bias."""
        return self._centre(x) * self.gain

    def transposed(self, direction: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """What to take the dot product of x with, to get that of `apply(x)` with `direction`."""
        return self._centre(direction * self.gain)

    @torch.no_grad()
    def inverse_scale(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
        """What the norm of x is multiplied by: apply(x) times this, plus bias, is the norm of x.

        Raises:
            ValueError: if the norm does not have this form.
        """
        if self.module is None:
            return torch.ones_like(x[..., :1])
        linear, output = self.apply(x), self.module(x) - self.bias
        inverse = (linear * output).sum(-1, keepdim=True) / linear.square().sum(-1, keepdim=True)
        error = (output - linear * inverse).norm(dim=-1) / output.norm(dim=-1)
        if bool((error > TOLERANCE).any()):
            raise ValueError(
                f"{type(self.module).__name__} is not (centre(x) · gain) / scale(x) + bias "
                f"(relative error {float(error.max()):.1e}), so it cannot be linearised"
            )
        return inverse

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x


@torch.no_grad()
def linear_norm(module: nn.Module | None, d_model: int, device: torch.device) -> LinearNorm:
    """The linear part of a norm module, or of no norm at all.

    Args:
        module: the model's norm; left as it is.
        d_model: its width.
        device: where the result goes if there is no module to tell.
    """
    if module is None:
        ones = torch.ones(d_model, device=device)
        return LinearNorm(None, ones, torch.zeros_like(ones), centred=False)
    norm = copy.deepcopy(module).float()
    device = next((one.device for one in norm.parameters()), device)
    # +1 and -1 in turn, mean zero: LayerNorm and RMSNorm do the same to it, namely multiply by the gain.
    probe = 1.0 - 2 * (torch.arange(d_model, device=device) % 2)
    probe = (probe - probe.mean()) * _LARGE
    # A zero vector has nothing to scale, so what comes out is the bias.
    bias = norm(torch.zeros_like(probe))
    scaled = norm(probe) - bias
    gain = scaled * probe.square().mean().sqrt() / probe
    shifted = norm(probe + _LARGE) - bias
    centred = bool((shifted - scaled).norm() < TOLERANCE * scaled.norm())
    return LinearNorm(norm, gain, bias, centred)
