"""What a training step of a sparse autoencoder minimises, and the terms that the architectures share.

Every squared error is summed over the output's axis and averaged over tokens, so that coefficients mean the same at
every batch size. The three terms of a `Loss` carry their coefficients: their sum is the total.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Loss(NamedTuple):
    """The loss of one batch of tokens; `total = reconstruction + sparsity + auxiliary`."""

    total: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    """Squared error, summed over the output and averaged over tokens (Matryoshka: over all prefixes)."""
    sparsity: Float[Tensor, ""]
    """The sparsity penalty, with its coefficient; 0 where the architecture needs none."""
    auxiliary: Float[Tensor, ""]
    """What keeps features alive, with its coefficient: AuxK, the gate's reconstruction, the pre-activation penalty."""
    output: Float[Tensor, "token d_out"]
    """The reconstruction, without gradient."""
    activations: Float[Tensor, "token feature"]
    """Feature activations, without gradient: of all features, or of those that `indices` names in each token."""
    indices: Int[Tensor, "token k"] | None
    """Which features `activations` holds; None: all, in order."""
    d_sae: int

    @property
    def features(self) -> Float[Tensor, "token d_sae"]:
        """Activations of all features, without gradient; made when asked for, if the step itself needed only a few."""
        if self.indices is None:
            return self.activations
        dense = self.activations.new_zeros(len(self.activations), self.d_sae)
        return dense.scatter_(1, self.indices, self.activations)

    @property
    def counts(self) -> Int[Tensor, " d_sae"]:
        """On how many tokens of the batch each feature is active: dead features, L0 and densities follow from it."""
        if self.indices is None:
            return (self.activations > 0).sum(0)
        active = (self.activations > 0).flatten().to(torch.int64)
        return torch.zeros(self.d_sae, dtype=torch.int64, device=active.device).index_add_(
            0, self.indices.flatten(), active
        )


def make_loss(
    reconstruction: Float[Tensor, ""],
    *,
    output: Float[Tensor, "token d_out"],
    activations: Float[Tensor, "token feature"],
    d_sae: int,
    sparsity: Float[Tensor, ""] | None = None,
    auxiliary: Float[Tensor, ""] | None = None,
    indices: Int[Tensor, "token k"] | None = None,
) -> Loss:
    """The terms added up; a term that is left out is 0."""
    nothing = reconstruction.new_zeros(())
    sparsity = nothing if sparsity is None else sparsity
    auxiliary = nothing if auxiliary is None else auxiliary
    total = reconstruction + sparsity + auxiliary
    return Loss(total, reconstruction, sparsity, auxiliary, output.detach(), activations.detach(), indices, d_sae=d_sae)


def squared_error(output: Float[Tensor, "token d_out"], target: Float[Tensor, "token d_out"]) -> Float[Tensor, ""]:
    """Squared distance to the target, averaged over tokens."""
    return (output - target).square().sum(-1).mean()


def weighted_l1(features: Float[Tensor, "token d_sae"], W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, ""]:
    """Sum of activations times decoder norms, averaged over tokens.

    The weights make it independent of how a feature's size is shared between encoder and decoder; under a unit-norm
    constraint they are 1.
    """
    # No matrix product, which autocast would round.
    return (features.mean(0) * W_dec.norm(dim=-1)).sum()


def strongest_dead(
    pre_activations: Float[Tensor, "token d_sae"], dead: Bool[Tensor, " d_sae"], k: int
) -> tuple[Float[Tensor, "token k_aux"], Int[Tensor, "token k_aux"]]:
    """The (up to k) dead features with the largest pre-activations in each token: values without gradient, indices."""
    names = dead.nonzero().squeeze(-1)
    values, chosen = pre_activations.detach()[:, names].topk(min(k, len(names)), dim=-1, sorted=False)
    return values, names[chosen]
