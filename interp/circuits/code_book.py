"""A small sparse autoencoder that turns vectors into integers: a learned vector quantiser."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.patching.progress import progress_bar

ROWS_A_STEP = 512
"""Vectors a training step: all of them if there are no more."""
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class CodeBook:
    """ReLU features of vectors around a centre, one code a feature, and one code more for vectors with no feature."""

    encoder: Float[Tensor, "code d_model"]
    threshold: Float[Tensor, " code"]
    decoder: Float[Tensor, "code d_model"]
    """Directions of norm 1."""
    centre: Float[Tensor, " d_model"]

    def features(self, vectors: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows code"]:
        """How strongly each feature is there."""
        return torch.relu((vectors - self.centre) @ self.encoder.T + self.threshold)

    def codes(self, vectors: Float[Tensor, "*rows d_model"]) -> Int[Tensor, "*rows"]:
        """The strongest feature; the number of features where none is there."""
        features = self.features(vectors)
        return features.argmax(-1).masked_fill(features.amax(-1) == 0, features.shape[-1])


def code_book(
    vectors: Float[Tensor, "row d_model"],
    n_codes: int,
    *,
    steps: int = 300,
    sparsity: float = 0.3,
    seed: int = 0,
    progress: bool | None = None,
) -> CodeBook:
    """Train an autoencoder: squared error, summed over d_model, plus `sparsity` times the sum of features.

    Features begin as the directions of vectors drawn from the data. Adam, learning rate 1e-3; decoder directions are
    brought back to norm 1 after each step.

    Args:
        vectors: of mean squared norm about 1.
        n_codes: features.
        steps: steps of training, each on all vectors or on `ROWS_A_STEP` drawn at random.
        sparsity: weight of the L1 penalty.
        seed: of all draws; the same seed gives the same book.
        progress: show a progress bar; None: in a terminal or notebook only.
    """
    vectors = vectors.detach().float()
    generator = torch.Generator().manual_seed(seed)
    centre = vectors.mean(0)
    drawn = vectors[torch.randint(len(vectors), (n_codes,), generator=generator).to(vectors.device)] - centre
    noise = torch.randn(drawn.shape, generator=generator).to(drawn) * 1e-3
    directions = torch.nn.functional.normalize(drawn + noise, dim=-1)
    parameters = [directions.clone(), directions.new_zeros(n_codes), directions.clone(), centre]
    with torch.enable_grad():
        encoder, threshold, decoder, centre = (one.requires_grad_() for one in parameters)
        optimiser = torch.optim.Adam([encoder, threshold, decoder, centre], lr=LEARNING_RATE)
        with progress_bar(steps, "training codes", "step", progress=progress) as bar:
            for _ in range(steps):
                batch = vectors
                if len(vectors) > ROWS_A_STEP:
                    batch = vectors[torch.randint(len(vectors), (ROWS_A_STEP,), generator=generator).to(vectors.device)]
                features = CodeBook(encoder, threshold, decoder, centre).features(batch)
                error = (batch - centre - features @ decoder).square().sum(1).mean()
                optimiser.zero_grad()
                (error + sparsity * features.sum(1).mean()).backward()
                optimiser.step()
                with torch.no_grad():
                    decoder.copy_(torch.nn.functional.normalize(decoder, dim=-1))
                bar.update(1)
    return CodeBook(encoder.detach(), threshold.detach(), decoder.detach(), centre.detach())
