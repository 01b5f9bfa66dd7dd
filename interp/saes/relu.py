"""The ReLU autoencoder with an L1 penalty: `features = ReLU((x - b_dec) W_enc + b_enc)`.

Source: Bricken et al. 2023 (Towards Monosemanticity); on attention outputs Kissane et al. 2024 (arXiv 2406.17759).
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from jaxtyping import Bool, Float
from torch import Tensor

from interp.saes.losses import Loss, make_loss, squared_error, weighted_l1
from interp.saes.sae import SAE, Shared


class ReLUSAE(SAE):
    """ReLU and L1.

    Args:
        d_in: width of the input.
        d_sae: number of features.
        l1: coefficient of the sum of activations times decoder norms.
        **shared: see `SAE`.
    """

    architecture: ClassVar[str] = "relu"

    def __init__(self, d_in: int, d_sae: int, *, l1: float = 1.0, **shared: Unpack[Shared]) -> None:
        super().__init__(d_in, d_sae, **shared)
        self.l1 = l1

    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build it again."""
        return {**super().settings(), "l1": self.l1}

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Positive parts of the pre-activations."""
        return self.pre_activations(x).relu()

    def loss(
        self,
        x: Float[Tensor, "*batch d_in"],
        target: Float[Tensor, "*batch d_out"] | None = None,
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
    ) -> Loss:
        """Squared error + l1 * sum of activations times decoder norms; dead features are left to resampling."""
        x, target = self.tokens(x, target)
        features = self.encode(x)
        output = self.decode(features, x)
        return make_loss(
            squared_error(output, target),
            sparsity=self.l1 * weighted_l1(features, self.W_dec),
            output=output,
            activations=features,
            d_sae=self.d_sae,
        )
