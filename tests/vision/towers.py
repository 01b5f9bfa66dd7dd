"""Tiny random vision transformers on a grid large enough to have rings, and their attention as transformers has it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from interp import Model
from tests.model.encoders import ENCODERS

VISION = ("vit", "dinov2", "dinov2_with_registers", "clip")


def vision_model(name: str, size: int = 16, *, dtype: torch.dtype = torch.float32) -> Model:
    """One of `VISION` for square images of this many pixels: (size / 4)² patches."""
    family = next(family for family in ENCODERS if family.name == name)
    family = replace(family, config=family.config | {"image_size": size})
    return Model(family.make_model("eager", dtype), name=f"tiny {name}")


def pixels(n: int = 2, size: int = 16, *, seed: int = 0) -> dict[str, Tensor]:
    """Images of noise."""
    return {"pixel_values": torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))}


@torch.no_grad()
def attentions(model: Model, images: dict[str, Tensor]) -> Tensor:
    """Patterns as transformers returns them, [layer, image, head, query, key]."""
    return torch.stack(model.hf(**images, output_attentions=True).attentions)
