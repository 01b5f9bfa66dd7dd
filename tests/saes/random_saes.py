"""Tiny SAEs with random weights, decoder norms and biases away from 1 and 0, for the tests of file formats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interp.saes import ARCHITECTURES, SAE

D_IN, D_SAE = 6, 10


def random_sae(architecture: str, *, seed: int = 0, **settings: Any) -> SAE:
    """An SAE whose features are now on, now off."""
    if architecture in ("topk", "batch_topk", "matryoshka"):
        settings = {"k": 3, **settings}
    if architecture == "matryoshka":
        settings = {"widths": [4, D_SAE], **settings}
    sae = ARCHITECTURES[architecture](D_IN, D_SAE, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            drawn = torch.randn(tensor.shape, generator=generator) * 0.6
            tensor.copy_(drawn.abs() * 0.6 if name == "threshold" else drawn)
    return sae


def vectors(n: int = 64, *, width: int = D_IN, seed: int = 1) -> Tensor:
    """What they are compared on."""
    return 2 * torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def assert_same_function(loaded: SAE, saved: SAE, *, atol: float = 1e-5) -> None:
    """Equal features, some on and some off, and equal outputs."""
    x = vectors()
    features = saved.encode(x)
    assert 0.05 < float((features > 0).float().mean()) < 0.95
    torch.testing.assert_close(loaded.encode(x), features, atol=atol, rtol=0)
    torch.testing.assert_close(loaded(x), saved(x), atol=atol, rtol=0)
