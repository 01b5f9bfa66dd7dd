"""A tiny random Llama in which chosen tokens are sinks: their embedding has a spike at one dimension."""

from __future__ import annotations

import torch
import transformers

import interp
from tests.conftest import randomise

SINK_DIM = 11
SINK_TOKENS = (1, 9)
"""A token that a prompt may begin with, and one that may stand among image patches."""
N_LAYERS, N_HEADS, VOCABULARY = 5, 4, 64


def planted_llama() -> interp.Model:
    """5 layers, 4 heads on 2 key/value heads, d_model 32; the spike outlives all layers."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    hf = randomise(transformers.LlamaForCausalLM(config))
    with torch.no_grad():
        hf.model.embed_tokens.weight[list(SINK_TOKENS), SINK_DIM] += 50
    return interp.load(hf, name="planted-llama")


def step_by_step(model: interp.Model, tokens: torch.Tensor, n_new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy continuation by whole passes without a cache: (tokens, logits [prompt, step, d_vocab])."""
    logits = []
    for _ in range(n_new):
        logits.append(model(tokens)[:, -1])
        tokens = torch.cat([tokens, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return tokens, torch.stack(logits, dim=1)


def generated(model: interp.Model, prompts: object, n_new: int, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy continuation by `generate`: (tokens, logits [prompt, step, d_vocab])."""
    logits = []
    head = model.hf.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: logits.append(output[:, -1]))
    try:
        tokens = model.generate(prompts, max_new_tokens=n_new, eos_token_id=None, **options)
    finally:
        handle.remove()
    return tokens, torch.stack(logits, dim=1)
