"""The JumpReLU autoencoder: a feature is its pre-activation where that exceeds the feature's own learnt threshold.

Neither the jump nor the count of active features has a gradient to the threshold, so both get the published
straight-through estimate, with bandwidth e and the rectangle kernel K(u) = 1[|u| < 1/2]:

    d/d threshold  JumpReLU(p)       = -(threshold / e) K((p - threshold) / e)
    d/d threshold  1[p > threshold]  = -(1 / e) K((p - threshold) / e)

The gradient to p is that of p where it is above the threshold, and 0 for the count.

Sources: Rajamanoharan et al. 2024 (arXiv 2407.14435), Eqs. 11 and 12; the tanh penalty and the penalty on dead
features: Conerly et al. 2025 (Anthropic), who also pass the estimate on to p, which is not done here.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from interp.saes.losses import Loss, make_loss, squared_error
from interp.saes.sae import SAE, Shared


class JumpReLUSAE(SAE):
    """One threshold a feature, 0 or more: training keeps it so, for below 0 only the count of the penalty would change.

    Args:
        d_in: width of the input.
        d_sae: number of features.
        sparsity: "step": the mean number of active features (L0); "tanh": the sum of
            tanh(`tanh_scale` * activation * decoder norm), a smooth count.
        coefficient: of the sparsity penalty.
        target_l0: with "step": the penalty is (L0 / target_l0 - 1)² instead of L0.
        bandwidth: e above: how near to its threshold a pre-activation informs it. In units of pre-activations.
        tanh_scale: see `sparsity`.
        dead_coefficient: of the mean over tokens of the sum, over dead features, of how far the pre-activation is below
            the threshold, times decoder norms.
        **shared: see `SAE`.

    Raises:
        ValueError: for an unknown penalty, a target without "step", or a bandwidth that is not positive.
    """

    architecture: ClassVar[str] = "jumprelu"
    feature_vectors: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")

    threshold: Float[nn.Parameter, " d_sae"]

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        sparsity: Literal["step", "tanh"] = "step",
        coefficient: float = 1.0,
        target_l0: float | None = None,
        bandwidth: float = 0.05,
        tanh_scale: float = 4.0,
        dead_coefficient: float = 3e-6,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(d_in, d_sae, **shared)
        if sparsity not in ("step", "tanh"):
            raise ValueError(f"sparsity={sparsity!r} is unknown; choose 'step' or 'tanh'")
        if target_l0 is not None and (sparsity != "step" or target_l0 <= 0):
            raise ValueError(f"target_l0={target_l0} goes with sparsity='step' and must be positive")
        if bandwidth <= 0:
            raise ValueError(f"bandwidth={bandwidth} must be positive")
        self.sparsity = sparsity
        self.coefficient = coefficient
        self.target_l0 = target_l0
        self.bandwidth = bandwidth
        self.tanh_scale = tanh_scale
        self.dead_coefficient = dead_coefficient

    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build it again."""
        own = ("sparsity", "coefficient", "target_l0", "bandwidth", "tanh_scale", "dead_coefficient")
        return {**super().settings(), **{name: getattr(self, name) for name in own}}

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Positive pre-activations above their thresholds."""
        return jump_relu(self.pre_activations(x), self.threshold, self.bandwidth)

    def loss(
        self,
        x: Float[Tensor, "*batch d_in"],
        target: Float[Tensor, "*batch d_out"] | None = None,
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
    ) -> Loss:
        """Squared error + the sparsity penalty + the penalty that pulls dead features up."""
        x, target = self.tokens(x, target)
        pre_activations = self.pre_activations(x)
        features = jump_relu(pre_activations, self.threshold, self.bandwidth)
        output = self.decode(features, x)
        auxiliary = None
        if dead is not None and self.dead_coefficient:
            below = (self.threshold - pre_activations).relu() * dead * self.W_dec.norm(dim=-1)
            auxiliary = self.dead_coefficient * below.sum(-1).mean()
        return make_loss(
            squared_error(output, target),
            sparsity=self.coefficient * self._penalty(pre_activations, features),
            auxiliary=auxiliary,
            output=output,
            activations=features,
            d_sae=self.d_sae,
        )

    def _penalty(
        self, pre_activations: Float[Tensor, "token d_sae"], features: Float[Tensor, "token d_sae"]
    ) -> Float[Tensor, ""]:
        if self.sparsity == "tanh":
            return (self.tanh_scale * features * self.W_dec.norm(dim=-1)).tanh().sum(-1).mean()
        l0 = step(pre_activations, self.threshold, self.bandwidth).sum(-1).mean()
        return l0 if self.target_l0 is None else (l0 / self.target_l0 - 1).square()


def jump_relu(
    pre_activations: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, " d_sae"], bandwidth: float
) -> Float[Tensor, "*batch d_sae"]:
    """Positive pre-activations above the threshold, else 0, with the straight-through gradient to the threshold."""
    activations: Tensor = _JumpReLU.apply(pre_activations, threshold, bandwidth)
    return activations


def step(
    pre_activations: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, " d_sae"], bandwidth: float
) -> Float[Tensor, "*batch d_sae"]:
    """1 where the pre-activation is above the threshold, with the straight-through gradient to the threshold."""
    above: Tensor = _Step.apply(pre_activations, threshold, bandwidth)
    return above


def _near(pre_activations: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """The rectangle kernel."""
    return ((pre_activations - threshold).abs() < bandwidth / 2).to(pre_activations.dtype)


class _JumpReLU(torch.autograd.Function):
    """`jump_relu`."""

    @staticmethod
    def forward(ctx: Any, pre_activations: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_activations, threshold)
        ctx.bandwidth = bandwidth
        return pre_activations.relu() * (pre_activations > threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        pre_activations, threshold = ctx.saved_tensors
        grad_threshold = None
        if ctx.needs_input_grad[1]:
            near = _near(pre_activations, threshold, ctx.bandwidth)
            grad_threshold = (-threshold / ctx.bandwidth) * (near * grad).sum_to_size(threshold.shape)
        return grad * ((pre_activations > threshold) & (pre_activations > 0)), grad_threshold, None


class _Step(torch.autograd.Function):
    """`step`."""

    @staticmethod
    def forward(ctx: Any, pre_activations: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_activations, threshold)
        ctx.bandwidth = bandwidth
        return (pre_activations > threshold).to(threshold.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        pre_activations, threshold = ctx.saved_tensors
        near = _near(pre_activations, threshold, ctx.bandwidth)
        return None, (near * grad).sum_to_size(threshold.shape) / -ctx.bandwidth, None
