"""Dead features, counted in tokens, and the scheme that gives them a new start."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interp.saes.architectures import INITIAL_THRESHOLD
from interp.saes.distributed import any_process
from interp.saes.randomness import generator
from interp.saes.sae import SAE

ENCODER_SHARE = 0.2
"""Norm of a resampled feature's encoder, as a share of the mean norm of those alive."""


class FiringRecord:
    """How many tokens ago each feature last fired, over all processes."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.tokens_since: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.long, device=device)

    def update(self, counts: Int[Tensor, " d_sae"], n_tokens: int) -> None:
        """Take in one batch: on how many of this process's tokens each feature fired, and the tokens of all."""
        self.tokens_since += n_tokens
        self.tokens_since[any_process(counts > 0)] = 0

    def dead(self, n_tokens: int) -> Bool[Tensor, " d_sae"]:
        """Features that have not fired for this many tokens."""
        return self.tokens_since >= n_tokens


@torch.no_grad()
def resample(
    sae: SAE,
    optimiser: torch.optim.Optimizer,
    dead: Bool[Tensor, " d_sae"],
    x: Float[Tensor, "token d_in"],
    target: Float[Tensor, "token d_out"],
    *,
    batch_size: int,
    seed: int,
) -> Int[Tensor, " chosen"]:
    """Point dead features at tokens that are badly reconstructed, and forget what the optimiser knew of them.

    A token is drawn with a probability in proportion to the square of its squared error, each once. The decoder row
    becomes its direction (target − b_dec, unit norm), the encoder column the same direction of the input at a fifth of
    the mean norm of living encoders, biases 0 and a threshold what a new SAE has.

    Args:
        sae: changed in place.
        optimiser: its averages of the changed rows and columns become 0.
        dead: which features.
        x: tokens to draw from.
        target: what they are to be reconstructed as.
        batch_size: tokens a forward pass.
        seed: of the draw.

    Returns:
        Which were resampled: all, unless fewer tokens are reconstructed imperfectly; none if no feature lives.

    Source: Bricken et al. 2023 (Towards Monosemanticity), as in Kissane et al. 2024.
    """
    error = torch.cat(
        [
            (sae(one) - wanted).square().sum(-1)
            for one, wanted in zip(x.split(batch_size), target.split(batch_size), strict=True)
        ]
    )
    weights = (error / error.max()).square().cpu()
    alive = ~dead
    chosen = dead.nonzero().squeeze(-1)[: int((weights > 0).sum())]
    if not len(chosen) or not bool(alive.any()):
        return chosen[:0]
    tokens = torch.multinomial(weights, len(chosen), generator=generator(seed, "resample")).to(x.device)
    size = ENCODER_SHARE * sae.W_enc[:, alive].norm(dim=0).mean()
    sae.W_dec[chosen] = _unit(target[tokens] - sae.b_dec)
    sae.W_enc[:, chosen] = (_unit(sae.encoder_input(x[tokens])) * size).T
    vectors = {name: sae.get_parameter(name) for name in sae.feature_vectors}
    for name, vector in vectors.items():
        vector[chosen] = INITIAL_THRESHOLD if name == "threshold" else 0
    for parameter in (sae.W_dec, sae.W_enc, *vectors.values()):
        for average in optimiser.state.get(parameter, {}).values():
            if isinstance(average, Tensor) and average.shape == parameter.shape:
                average[(slice(None), chosen) if parameter is sae.W_enc else chosen] = 0
    return chosen


def _unit(vectors: Float[Tensor, "token d"]) -> Float[Tensor, "token d"]:
    return nn.functional.normalize(vectors, dim=-1)
