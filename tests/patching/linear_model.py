"""A model that is linear in its embeddings, so that first-order estimates of it are exact."""

from __future__ import annotations

import torch
import transformers
from torch import nn

import interp
from tests.patching.tokens_task import task_of_tokens


def linear_model(n_layers=3):
    """GPT-2 in float64 without norms, with identity activations and queries of 0, which make every pattern uniform."""
    config = transformers.GPT2Config(
        vocab_size=61,
        n_embd=16,
        n_head=4,
        n_layer=n_layers,
        n_inner=12,
        n_positions=16,
        activation_function="linear",
        bos_token_id=1,
        eos_token_id=2,
    )
    config._attn_implementation = "eager"
    hf = transformers.GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for block in hf.transformer.h:
            block.attn.c_attn.weight[:, :16] = 0
            block.attn.c_attn.bias[:16] = 0
            block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
    hf.transformer.ln_f = nn.Identity()
    return interp.load(hf.double().eval())


def pairs_of_tokens(n_prompts=3, length=7, seed=0):
    """Random prompts that differ from their corrupted ones at position 2, one of them at 4 as well."""
    clean = torch.randint(5, 60, (n_prompts, length), generator=torch.Generator().manual_seed(seed))
    corrupted = clean.clone()
    corrupted[:, 2] = 5 + (clean[:, 2] + 7) % 50
    corrupted[n_prompts // 2, 4] = 5 + (clean[n_prompts // 2, 4] + 11) % 50
    return task_of_tokens(clean, corrupted)
