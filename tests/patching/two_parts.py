"""Contextual decomposition written out by hand, both parts side by side, in float64: what the package is held against.

Follows Hsu et al. 2025 (arXiv 2407.00886) literally: each part of every activation is computed by its own rule, from
the weights, without the model's forward code (rotary tables and masks apart).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


@dataclass
class Two:
    """Relevant and irrelevant part."""

    own: Tensor
    rest: Tensor

    @property
    def total(self) -> Tensor:
        return self.own + self.rest

    def map(self, fn: Callable[[Tensor], Tensor]) -> Two:
        return Two(fn(self.own), fn(self.rest))

    def __add__(self, other: Two) -> Two:
        return Two(self.own + other.own, self.rest + other.rest)


Source = Callable[[int, Two], Two]
"""(layer, z [pos, head, d_head] as it arrives) -> the parts that go on."""


@dataclass
class Rules:
    """The rules, with what can be chosen."""

    frozen: bool = False
    share_bias: bool = True

    def linear(self, x: Two, module: Any) -> Two:
        weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
        return self._with_bias(x.map(lambda part: part @ weight), module.bias, None)

    def _with_bias(self, y: Two, bias: Tensor | None, sizes: Two | None) -> Two:
        if bias is None:
            return y
        if not self.share_bias:
            return Two(y.own, y.rest + bias)
        by = (sizes or y).map(torch.abs)
        return Two(y.own + bias * by.own / (by.own + by.rest), y.rest + bias * by.rest / (by.own + by.rest))

    def layer_norm(self, x: Two, module: nn.LayerNorm) -> Two:
        scale = x.total.var(-1, correction=0, keepdim=True).add(module.eps).sqrt()
        y = x.map(lambda part: (part - part.mean(-1, keepdim=True)) / scale * module.weight)
        return self._with_bias(y, module.bias, x)

    def rms_norm(self, x: Two, weight: Tensor, eps: float) -> Two:
        scale = x.total.square().mean(-1, keepdim=True).add(eps).sqrt()
        return x.map(lambda part: part / scale * weight)

    def activation(self, x: Two, fn: Callable[[Tensor], Tensor]) -> Two:
        return Two(fn(x.total) - fn(x.rest), fn(x.rest))

    def product(self, x: Two, y: Two) -> Two:
        return Two(x.total * y.total - x.rest * y.rest, x.rest * y.rest)

    def attention(self, q: Two, k: Two, v: Two, scale: float, mask: Tensor) -> Two:
        """All [head, pos, d_head], mask additive [pos, pos]; z [pos, head, d_head]."""
        pattern = (q.total @ k.total.mT * scale + mask).softmax(-1)
        own = pattern if self.frozen else (q.own @ k.own.mT * scale + mask).softmax(-1)
        total, part = pattern @ v.total, own @ v.own
        return Two(part, total - part).map(lambda z: z.transpose(0, 1))


def mask_of(length: int, *, causal: bool, window: int | None = None) -> Tensor:
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (distance < 0) & causal
    if window is not None:
        hidden |= distance >= window
    return torch.zeros(length, length, dtype=torch.float64).masked_fill(hidden, -math.inf)


def heads(x: Two, d_head: int) -> Two:
    return x.map(lambda part: part.unflatten(-1, (-1, d_head)).transpose(0, 1))


def gpt2(hf: Any, tokens: Tensor, source: Source, rules: Rules) -> Two:
    """Logits of one prompt."""
    body, length = hf.transformer, len(tokens)
    embedding = body.wte(tokens) + body.wpe(torch.arange(length))
    x = Two(torch.zeros_like(embedding), embedding)
    for layer, block in enumerate(body.h):
        n = rules.linear(rules.layer_norm(x, block.ln_1), block.attn.c_attn)
        q, k, v = (heads(n.map(lambda part, i=i: part.chunk(3, -1)[i]), block.attn.head_dim) for i in range(3))
        z = rules.attention(q, k, v, block.attn.head_dim**-0.5, mask_of(length, causal=True))
        x = x + rules.linear(source(layer, z).map(lambda part: part.flatten(1)), block.attn.c_proj)
        h = rules.linear(rules.layer_norm(x, block.ln_2), block.mlp.c_fc)
        x = x + rules.linear(rules.activation(h, block.mlp.act), block.mlp.c_proj)
    return rules.linear(rules.layer_norm(x, body.ln_f), hf.lm_head)


def bert(hf: Any, tokens: Tensor, source: Source, rules: Rules) -> Two:
    """Logits of one prompt."""
    embedding = hf.bert.embeddings(tokens[None])[0]
    x = Two(torch.zeros_like(embedding), embedding)
    for layer, block in enumerate(hf.bert.encoder.layer):
        attn, size = block.attention.self, block.attention.self.attention_head_size
        q, k, v = (heads(rules.linear(x, module), size) for module in (attn.query, attn.key, attn.value))
        z = source(layer, rules.attention(q, k, v, size**-0.5, mask_of(len(tokens), causal=False)))
        out = rules.linear(z.map(lambda part: part.flatten(1)), block.attention.output.dense)
        x = rules.layer_norm(out + x, block.attention.output.LayerNorm)
        h = rules.activation(rules.linear(x, block.intermediate.dense), block.intermediate.intermediate_act_fn)
        x = rules.layer_norm(rules.linear(h, block.output.dense) + x, block.output.LayerNorm)
    head = hf.cls.predictions
    h = rules.activation(rules.linear(x, head.transform.dense), head.transform.transform_act_fn)
    return rules.linear(rules.layer_norm(h, head.transform.LayerNorm), head.decoder)


def llama(hf: Any, tokens: Tensor, source: Source, rules: Rules) -> Two:
    """Logits of one prompt by a model with RMSNorm, rotary, grouped keys and a gated MLP; Qwen-3 and Gemma-3 too."""
    body, config, length = hf.model, hf.config, len(tokens)
    is_gemma = config.model_type.startswith("gemma")
    embedding = body.embed_tokens(tokens[None])[0]
    x = Two(torch.zeros_like(embedding), embedding)

    def norm(part: Two, module: Any) -> Two:
        return rules.rms_norm(part, module.weight + is_gemma, config.rms_norm_eps)

    for layer, block in enumerate(body.layers):
        attn, size, n = block.self_attn, block.self_attn.head_dim, norm(x, block.input_layernorm)
        q, k, v = (heads(rules.linear(n, module), size) for module in (attn.q_proj, attn.k_proj, attn.v_proj))
        if hasattr(attn, "q_norm"):
            q, k = norm(q, attn.q_norm), norm(k, attn.k_norm)
        q, k = (rotated(part, body, attn, length, is_gemma) for part in (q, k))
        k, v = (by_query_head(part, len(q.own)) for part in (k, v))
        mask = mask_of(length, causal=True, window=getattr(attn, "sliding_window", None))
        z = source(layer, rules.attention(q, k, v, attn.scaling, mask))
        out = rules.linear(z.map(lambda part: part.flatten(1)), attn.o_proj)
        x = x + (norm(out, block.post_attention_layernorm) if is_gemma else out)
        n = norm(x, block.pre_feedforward_layernorm if is_gemma else block.post_attention_layernorm)
        gate = rules.activation(rules.linear(n, block.mlp.gate_proj), block.mlp.act_fn)
        out = rules.linear(rules.product(gate, rules.linear(n, block.mlp.up_proj)), block.mlp.down_proj)
        x = x + (norm(out, block.post_feedforward_layernorm) if is_gemma else out)
    return rules.linear(norm(x, body.norm), hf.lm_head)


def rotated(x: Two, body: Any, attn: Any, length: int, is_gemma: bool) -> Two:
    kind = (attn.layer_type,) if is_gemma else ()
    cos, sin = body.rotary_emb(x.own, torch.arange(length)[None], *kind)
    return x.map(lambda part: apply_rotary_pos_emb(part[None], part[None], cos, sin)[0][0])


def by_query_head(x: Two, n_heads: int) -> Two:
    return x.map(lambda part: part.repeat_interleave(n_heads // len(part), 0))
