"""Sparse data made from known directions: training finds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from interp.saes.architectures import make
from interp.saes.decoder import normalise_decoder, remove_parallel_gradient
from interp.saes.sae import SAE

D_IN, N_TRUE, ACTIVE, BATCH, STEPS = 24, 32, 2, 256, 1000


def planted(n_tokens: int, directions: Tensor, generator: torch.Generator) -> Tensor:
    """Each token the sum of a few directions, each times a number from 0.5 to 1.5, and a constant."""
    chosen = torch.rand(n_tokens, N_TRUE, generator=generator).topk(ACTIVE, dim=-1).indices
    sizes = 0.5 + torch.rand(n_tokens, ACTIVE, generator=generator)
    return torch.zeros(n_tokens, N_TRUE).scatter(1, chosen, sizes) @ directions + 0.3


def train(sae: SAE, text: Tensor) -> None:
    """Adam with unit decoder rows; a feature that was silent for ten batches counts as dead."""
    optimiser = torch.optim.Adam(sae.parameters(), lr=4e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, STEPS)
    silent = torch.zeros(sae.d_sae, dtype=torch.int64)
    batches = text.split(BATCH)
    for number in range(STEPS):
        loss = sae.loss(batches[number % len(batches)], dead=silent >= 10)
        silent = torch.where(loss.counts > 0, 0, silent + 1)
        optimiser.zero_grad()
        loss.total.backward()
        remove_parallel_gradient(sae)
        optimiser.step()
        schedule.step()
        normalise_decoder(sae)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("topk", {"k": ACTIVE}),
        ("batch_topk", {"k": ACTIVE, "auxk_coefficient": 1.0}),
        ("jumprelu", {"coefficient": 0.2, "bandwidth": 0.1}),
    ],
)
def test_planted_directions_are_recovered(architecture: str, settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(N_TRUE, D_IN, generator=generator), dim=-1)
    text = planted(64 * BATCH, directions, generator)
    sae = make(architecture, D_IN, 3 * N_TRUE, b_dec=text.mean(0), seed=1, **settings)
    before = (directions @ sae.W_dec.T).amax(1)
    train(sae, text)
    cosine = (directions @ sae.W_dec.detach().T).amax(1)
    assert (before > 0.95).float().mean() < 0.1
    assert (cosine > 0.95).float().mean() >= 0.95, cosine.sort().values
    # What each token's code holds at inference is what went in, not a cloud of near copies.
    features = sae.encode(planted(2000, directions, generator))
    assert (features > 0).sum(-1).float().mean() == pytest.approx(ACTIVE, abs=0.5)
