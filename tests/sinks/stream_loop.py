"""A streamed Llama written out: lists of unrotated keys and values, and an explicit rotation at every step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

Kept = tuple[int, Tensor, Tensor]
"""(position in the text, key before rotary [kv_head, d_head], value)."""


def rotate(vectors: Tensor, position: int, theta: float) -> Tensor:
    """Coordinates i and i + d/2 of each head turn together by the angle position * theta^(-2i/d)."""
    half = vectors.shape[-1] // 2
    angles = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = vectors[..., :half], vectors[..., half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


@torch.no_grad()
def streamed_llama(hf: nn.Module, ids: list[int], *, sinks: int, recent: int, rope: str, cut_after: set[int]) -> Tensor:
    """Logits [pos, vocab] of one sequence through a float64 Llama; the cache is cut after the passes that end there."""
    config = hf.config
    n_heads, n_kv, d_head = (
        config.num_attention_heads,
        config.num_key_value_heads,
        hf.model.layers[0].self_attn.head_dim,
    )
    theta = config.rope_parameters["rope_theta"]
    caches: list[list[Kept]] = [[] for _ in hf.model.layers]
    logits = []
    for at, token in enumerate(ids):
        resid = hf.model.embed_tokens.weight[token]
        for block, cache in zip(hf.model.layers, caches, strict=True):
            normed = block.input_layernorm(resid)
            q = block.self_attn.q_proj(normed).view(n_heads, d_head)
            k = block.self_attn.k_proj(normed).view(n_kv, d_head)
            cache.append((at, k, block.self_attn.v_proj(normed).view(n_kv, d_head)))
            places = [original if rope == "original" else column for column, (original, _, _) in enumerate(cache)]
            keys = torch.stack([rotate(key, place, theta) for place, (_, key, _) in zip(places, cache, strict=True)])
            values = torch.stack([value for _, _, value in cache])
            q = rotate(q, places[-1], theta)
            z = []
            for head in range(n_heads):
                group = head * n_kv // n_heads
                pattern = torch.softmax(keys[:, group] @ q[head] / math.sqrt(d_head), dim=0)
                z.append(pattern @ values[:, group])
            resid = resid + block.self_attn.o_proj(torch.cat(z))
            resid = resid + block.mlp(block.post_attention_layernorm(resid))
        logits.append(hf.lm_head(hf.model.norm(resid)))
        if at in cut_after:
            caches = [
                cache if len(cache) <= sinks + recent else cache[:sinks] + cache[len(cache) - recent :]
                for cache in caches
            ]
    return torch.stack(logits)
