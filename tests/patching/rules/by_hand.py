"""Forward passes written out with the explicit detach formulation of relevance rules: what hooked models are held to.

A factor that is a constant to a rule is `.detach()`ed where it is computed, and half a gradient is `x / 2 + (x /
2).detach()`; nothing here comes from `interp`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def share(x: Tensor, part: float) -> Tensor:
    """x, with this part of its gradient."""
    return x * part + (x * (1 - part)).detach()


def through_origin(function: Callable[[Tensor], Tensor], x: Tensor, at_zero: float = 0.5) -> Tensor:
    """f(x) as x times the constant f(x)/x."""
    safe = torch.where(x == 0, 1.0, x)
    return x * torch.where(x == 0, at_zero, function(x) / safe).detach()


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / ((x**2).mean(-1, keepdim=True) + eps).sqrt().detach() * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    y = centred / ((centred**2).mean(-1, keepdim=True) + eps).sqrt().detach() * weight
    return y if bias is None else y + bias


@dataclass
class ByHand:
    """One forward pass under rules, with the activations of sites on its graph."""

    half: bool = True
    stop_gate: bool = False
    ah: bool = False
    query_key: float = 1.0
    value: float = 1.0
    sites: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, kind: str, layer: int, x: Tensor) -> Tensor:
        self.sites[f"{kind}.{layer}"] = x
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention; q [batch, pos, head, d], k and v [batch, pos, kv_head, d]."""
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        q, k, v = share(q, self.query_key), share(k, self.query_key), share(v, self.value)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        pattern = torch.softmax(scores.masked_fill(future, -math.inf), -1)
        return torch.einsum("bhqk,bkhd->bqhd", pattern.detach() if self.ah else pattern, v)

    def gated(self, gate: Tensor, up: Tensor, function: Callable[[Tensor], Tensor] = silu) -> Tensor:
        if self.stop_gate:
            return function(gate).detach() * up
        product = through_origin(function, gate) * up
        return share(product, 0.5) if self.half else product

    def llama(self, hf: Any, tokens: Tensor) -> Tensor:
        """Logits of a Llama (grouped keys and values, biases, any head size)."""
        config = hf.config
        resid = hf.model.embed_tokens(tokens).detach().requires_grad_()
        for layer, block in enumerate(hf.model.layers):
            self.keep("resid_pre", layer, resid)
            x = self.keep("ln1", layer, rms_norm(resid, block.input_layernorm.weight, config.rms_norm_eps))
            attn = block.self_attn
            q, k, v = (p(x).unflatten(-1, (-1, config.head_dim)) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
            self.keep("q", layer, q)
            self.keep("k", layer, k)
            self.keep("v", layer, v)
            z = self.keep("z", layer, self.attend(rotated(q, config), rotated(k, config), v))
            resid = resid + self.keep("attn_out", layer, attn.o_proj(z.flatten(-2)))
            self.keep("resid_mid", layer, resid)
            x = self.keep("ln2", layer, rms_norm(resid, block.post_attention_layernorm.weight, config.rms_norm_eps))
            gate = self.keep("mlp_pre", layer, block.mlp.gate_proj(x))
            neurons = self.keep("mlp_post", layer, self.gated(gate, block.mlp.up_proj(x)))
            resid = resid + self.keep("mlp_out", layer, block.mlp.down_proj(neurons))
        return hf.lm_head(rms_norm(resid, hf.model.norm.weight, config.rms_norm_eps))

    def gpt2(self, hf: Any, tokens: Tensor) -> Tensor:
        """Logits of a GPT-2."""
        body, eps, d_head = hf.transformer, hf.config.layer_norm_epsilon, hf.config.n_embd // hf.config.n_head
        resid = (body.wte(tokens) + body.wpe(torch.arange(tokens.shape[1]))).detach().requires_grad_()
        for layer, block in enumerate(body.h):
            self.keep("resid_pre", layer, resid)
            x = self.keep("ln1", layer, layer_norm(resid, block.ln_1.weight, block.ln_1.bias, eps))
            q, k, v = conv1d(block.attn.c_attn, x).unflatten(-1, (3, -1, d_head)).unbind(-3)
            z = self.keep("z", layer, self.attend(q, k, v))
            resid = resid + self.keep("attn_out", layer, conv1d(block.attn.c_proj, z.flatten(-2)))
            self.keep("resid_mid", layer, resid)
            x = self.keep("ln2", layer, layer_norm(resid, block.ln_2.weight, block.ln_2.bias, eps))
            before = self.keep("mlp_pre", layer, conv1d(block.mlp.c_fc, x))
            neurons = self.keep("mlp_post", layer, through_origin(gelu_tanh, before))
            resid = resid + self.keep("mlp_out", layer, conv1d(block.mlp.c_proj, neurons))
        return layer_norm(resid, body.ln_f.weight, body.ln_f.bias, eps) @ hf.lm_head.weight.T


def conv1d(module: nn.Module, x: Tensor) -> Tensor:
    return x @ module.weight + module.bias


def rotated(x: Tensor, config: Any) -> Tensor:
    """Rotary embedding of [batch, pos, head, d], halves rotated into each other."""
    half = x.shape[-1] // 2
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None] * frequency
    first, second = x.split(half, dim=-1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)
