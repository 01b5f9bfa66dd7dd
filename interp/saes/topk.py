"""TopK and BatchTopK autoencoders, with the auxiliary loss that brings dead features back to life.

TopK keeps the k largest pre-activations of each token, as far as they are positive. BatchTopK keeps the k * tokens
largest of a whole batch while it trains; at inference a feature is active where it exceeds a threshold, the running
mean of the smallest activation that was kept, so that a token's code does not depend on its neighbours.

Sources: Gao et al. 2024 (arXiv 2406.04093); Bussmann et al. 2024 (arXiv 2412.06410).
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.kernels.sparse_decode import sparse_decode
from interp.kernels.topk_encode import selected_columns, topk_encode
from interp.saes.losses import Loss, make_loss, squared_error, strongest_dead
from interp.saes.sae import SAE, Shared


class TopKOptions(Shared, total=False):
    """Keyword arguments of the TopK family; see `TopKFamily`."""

    k: int
    auxk_coefficient: float
    k_aux: int | None


class BatchTopKOptions(TopKOptions, total=False):
    """Keyword arguments of BatchTopK and Matryoshka; see `BatchTopKFamily`."""

    threshold_rate: float


class TopKFamily(SAE):
    """What TopK and its relatives share: k, AuxK, and no sparsity penalty.

    Args:
        d_in: width of the input.
        d_sae: number of features.
        k: features active in a token (of a batch: on average).
        auxk_coefficient: of the auxiliary loss; 0 switches it off.
        k_aux: dead features that each token tries to explain its error with; half of d_in by default.
        **shared: see `SAE`.

    Raises:
        ValueError: if k is not between 1 and d_sae, or k_aux not 1 or more.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        k: int = 32,
        auxk_coefficient: float = 1 / 32,
        k_aux: int | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(d_in, d_sae, **shared)
        if not 1 <= k <= d_sae:
            raise ValueError(f"k={k} is outside 1..{d_sae}, the number of features")
        if k_aux is not None and k_aux < 1:
            raise ValueError(f"k_aux={k_aux} must be 1 or more; auxk_coefficient=0 switches the auxiliary loss off")
        self.k = k
        self.auxk_coefficient = auxk_coefficient
        self.k_aux = max(1, d_in // 2) if k_aux is None else k_aux

    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build it again."""
        own = {"k": self.k, "auxk_coefficient": self.auxk_coefficient, "k_aux": self.k_aux}
        return {**super().settings(), **own}

    def auxk_loss(
        self,
        x: Float[Tensor, "token d_in"],
        pre_activations: Float[Tensor, "kept d_sae"],
        error: Float[Tensor, "token d_out"],
        dead: Bool[Tensor, " d_sae"] | None,
    ) -> Float[Tensor, ""] | None:
        """Squared error of what the `k_aux` strongest dead features make of the error, with its coefficient.

        The error itself gets no gradient. None where no feature is dead, and then no pre-activations need be given.
        """
        if dead is None or not self.auxk_coefficient or not bool(dead.any()):
            return None
        values, indices = strongest_dead(pre_activations, dead, self.k_aux)
        values = selected_columns(x, self._shift(), self.W_enc, self.b_enc, indices, values).relu()
        return self.auxk_coefficient * squared_error(sparse_decode(indices, values, self.W_dec), error.detach())

    def _shift(self) -> Float[Tensor, " d_in"] | None:
        """What is subtracted from the input."""
        return self.b_dec if self.apply_b_dec_to_input else None


class TopKSAE(TopKFamily):
    """The k largest pre-activations of each token."""

    architecture: ClassVar[str] = "topk"

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """The k largest pre-activations of each token, as far as they are positive."""
        values, indices = self.pre_activations(x).topk(self.k, dim=-1, sorted=False)
        return values.new_zeros(*x.shape[:-1], self.d_sae).scatter(-1, indices, values.relu())

    def loss(
        self,
        x: Float[Tensor, "*batch d_in"],
        target: Float[Tensor, "*batch d_out"] | None = None,
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
    ) -> Loss:
        """Squared error + AuxK of the dead features. Decoder and backward cost k, not d_sae, rows a token."""
        x, target = self.tokens(x, target)
        self.check_input(x)
        values, indices, pre_activations = topk_encode(
            x, self._shift(), self.W_enc, self.b_enc, self.k, keep=dead is not None and bool(dead.any())
        )
        values = values.relu()
        output = self.add_skip(sparse_decode(indices, values, self.W_dec) + self.b_dec, x)
        return make_loss(
            squared_error(output, target),
            auxiliary=self.auxk_loss(x, pre_activations, target - output, dead),
            output=output,
            activations=values,
            indices=indices,
            d_sae=self.d_sae,
        )


class BatchTopKFamily(TopKFamily):
    """What BatchTopK and Matryoshka share: selection over the batch in training, a threshold at inference.

    Args:
        d_in: width of the input.
        d_sae: number of features.
        threshold_rate: share of the newest batch in the running mean of the threshold.
        **options: see `TopKFamily` and `SAE`.

    Raises:
        ValueError: if the rate is no share of a batch.
    """

    threshold: Float[Tensor, ""]

    def __init__(self, d_in: int, d_sae: int, *, threshold_rate: float = 0.01, **options: Unpack[TopKOptions]) -> None:
        super().__init__(d_in, d_sae, **options)
        if not 0 < threshold_rate <= 1:
            raise ValueError(f"threshold_rate={threshold_rate} is a share: more than 0 and at most 1")
        self.threshold_rate = threshold_rate
        self.register_buffer("threshold", torch.zeros(()))

    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build it again."""
        return {**super().settings(), "threshold_rate": self.threshold_rate}

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Pre-activations above the threshold, whatever the other tokens are; all positive ones before any training."""
        pre_activations = self.pre_activations(x)
        return pre_activations.relu() * (pre_activations > self.threshold)

    def select(self, pre_activations: Float[Tensor, "token d_sae"]) -> Float[Tensor, "token d_sae"]:
        """The k * tokens largest positive pre-activations of the batch; in training mode the threshold follows."""
        flat = pre_activations.relu().flatten()
        values, indices = flat.topk(min(self.k * len(pre_activations), flat.numel()), sorted=False)
        if self.training:
            self._follow(values.detach())
        return torch.zeros_like(flat).scatter(0, indices, values).view_as(pre_activations)

    @torch.no_grad()
    def _follow(self, values: Float[Tensor, " kept"]) -> None:
        """One step of the running mean of the smallest positive activation kept; the first batch sets it."""
        smallest = torch.where(values > 0, values, torch.inf).amin()
        step = torch.where(self.threshold == 0, 1.0, self.threshold_rate)
        # Without a wait for the device: a batch in which nothing was positive leaves it where it was.
        self.threshold.add_(torch.where(smallest.isfinite(), step * (smallest - self.threshold), 0.0))


class BatchTopKSAE(BatchTopKFamily):
    """The k * tokens largest pre-activations of a batch."""

    architecture: ClassVar[str] = "batch_topk"

    def loss(
        self,
        x: Float[Tensor, "*batch d_in"],
        target: Float[Tensor, "*batch d_out"] | None = None,
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
    ) -> Loss:
        """Squared error + AuxK, with features selected over all tokens given; in training mode moves the threshold."""
        x, target = self.tokens(x, target)
        pre_activations = self.pre_activations(x)
        features = self.select(pre_activations)
        output = self.decode(features, x)
        return make_loss(
            squared_error(output, target),
            auxiliary=self.auxk_loss(x, pre_activations, target - output, dead),
            output=output,
            activations=features,
            d_sae=self.d_sae,
        )
