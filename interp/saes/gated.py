"""The gated autoencoder: one affine map says which features are active, another, sharing its directions, how much.

    gate     = (x - b_dec) W_enc + b_gate
    features = 1[gate > 0] * ReLU(((x - b_dec) W_enc) * exp(r_mag) + b_mag)

Source: Rajamanoharan et al. 2024 (arXiv 2404.16014). The step of the gate has no gradient; the penalty and an auxiliary
reconstruction, both from ReLU(gate), train it. As published, that reconstruction has a decoder without gradient.
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from jaxtyping import Bool, Float
from torch import Tensor

from interp.saes.losses import Loss, make_loss, squared_error, weighted_l1
from interp.saes.sae import SAE, Shared


class GatedSAE(SAE):
    """Gate and magnitude.

    Args:
        d_in: width of the input.
        d_sae: number of features.
        l1: coefficient of the sum of ReLU(gate) times decoder norms.
        **shared: see `SAE`.
    """

    architecture: ClassVar[str] = "gated"
    feature_vectors: ClassVar[tuple[str, ...]] = ("b_gate", "b_mag", "r_mag")

    b_gate: Float[Tensor, " d_sae"]
    b_mag: Float[Tensor, " d_sae"]
    r_mag: Float[Tensor, " d_sae"]

    def __init__(self, d_in: int, d_sae: int, *, l1: float = 1.0, **shared: Unpack[Shared]) -> None:
        super().__init__(d_in, d_sae, **shared)
        self.l1 = l1

    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build it again."""
        return {**super().settings(), "l1": self.l1}

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """The gate before its step: a feature is active where this and its magnitude are positive."""
        return self.encoder_input(x) @ self.W_enc + self.b_gate

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Magnitudes where the gate is open."""
        return self._gate_and_features(x)[1]

    def loss(
        self,
        x: Float[Tensor, "*batch d_in"],
        target: Float[Tensor, "*batch d_out"] | None = None,
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
    ) -> Loss:
        """Squared error + l1 * ReLU(gate) times decoder norms + squared error of ReLU(gate) by the frozen decoder."""
        x, target = self.tokens(x, target)
        gate, features = self._gate_and_features(x)
        output = self.decode(features, x)
        opened = gate.relu()
        from_gate = opened @ self.W_dec.detach() + self.b_dec.detach()
        if self.W_skip is not None:
            from_gate = from_gate + x @ self.W_skip.detach()
        return make_loss(
            squared_error(output, target),
            sparsity=self.l1 * weighted_l1(opened, self.W_dec),
            auxiliary=squared_error(from_gate, target),
            output=output,
            activations=features,
            d_sae=self.d_sae,
        )

    def _gate_and_features(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_sae"], Float[Tensor, "*batch d_sae"]]:
        """Both maps from one product."""
        projected = self.encoder_input(x) @ self.W_enc
        gate = projected + self.b_gate
        return gate, (projected * self.r_mag.exp() + self.b_mag).relu() * (gate > 0)
