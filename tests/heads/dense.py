"""Whole weight matrices, norms folded in by the formula of each family: what small products are held against."""

from __future__ import annotations

import torch

import interp


def folded(model: interp.Model, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(W_V, W_O) of a head in float64, norms folded in by hand."""
    per_group = model.n_heads // model.n_kv_heads
    W_V = model.W_V[layer, head // per_group].double()
    W_O = model.W_O[layer, head].double()
    family = model.anatomy.family
    block = model.tower.blocks[layer]
    if family == "gpt2":
        W_V = (torch.eye(32).double() - 1 / 32) @ (block.ln1.weight.detach().double()[:, None] * W_V)
    elif family == "llama":
        W_V = block.ln1.weight.detach().double()[:, None] * W_V
    else:
        W_V = (1 + block.ln1.weight.detach().double())[:, None] * W_V
        W_O = W_O * (1 + block.attn_post.weight.detach().double())
    return W_V, W_O
