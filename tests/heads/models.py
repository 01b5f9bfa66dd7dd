"""Tiny random models of families that differ in what direct effects and weights go through."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

import interp

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "max_position_embeddings": 64}
GATED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0}
MODELS = {
    "gemma2": (hf.Gemma2ForCausalLM, {**GATED, "head_dim": 8, "final_logit_softcapping": 5.0}),
    "opt": (
        hf.OPTForCausalLM,
        {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True, "pad_token_id": 0},
    ),
    "gpt_neox": (hf.GPTNeoXForCausalLM, {**SIZES, "intermediate_size": 48, "use_parallel_residual": True}),
    "granite": (
        hf.GraniteForCausalLM,
        {**GATED, "residual_multiplier": 0.3, "logits_scaling": 4.0, "embedding_multiplier": 2.0},
    ),
    "cohere": (hf.CohereForCausalLM, {**GATED, "logit_scale": 0.25}),
    "olmo2": (hf.Olmo2ForCausalLM, GATED),
}


def make(name: str, tokenizer: Any, **changes: Any) -> interp.Model:
    """The model by its name in `MODELS`, with other config values if wanted; the same weights on every call."""
    architecture, sizes = MODELS[name]
    config = architecture.config_class(**{**sizes, "vocab_size": len(tokenizer), **changes})
    model = architecture(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * 0.3) if parameter.dim() == 1 else parameter.copy_(noise * 0.2)
    return interp.load(model, tokenizer=tokenizer)
