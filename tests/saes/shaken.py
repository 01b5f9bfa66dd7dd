"""Random SAEs in which every parameter matters, for tests of what is read off SAEs."""

from __future__ import annotations

from typing import Any

import torch

import interp
from interp.saes.architectures import make
from interp.saes.sae import SAE

D_SAE = 24
SETTINGS = {"topk": {"k": 3}, "batch_topk": {"k": 3}, "matryoshka": {"k": 3}}
"""What architectures need beside their widths."""


def shaken(sae: SAE, seed: int = 0) -> SAE:
    """Every parameter moved at random, so that a forgotten bias shows; thresholds stay positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.abs() if "threshold" in name else noise)
    return sae.requires_grad_(False)


def z_sae(model: interp.Model, layer: int = 2, architecture: str = "relu") -> SAE:
    """An SAE on the `hook_z` of a layer."""
    site = f"blocks.{layer}.attn.hook_z"
    settings: dict[str, Any] = SETTINGS.get(architecture, {})
    return shaken(make(architecture, model.n_heads * model.d_head, D_SAE, site=site, **settings), seed=layer)


def transcoder(model: interp.Model, layer: int = 0) -> SAE:
    """A skip transcoder from the norm before the MLP to what the MLP adds."""
    site, target = f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out"
    made = make("relu", model.d_model, D_SAE, site=site, target_site=target, d_out=model.d_model, skip=True)
    return shaken(made, seed=10 + layer)
