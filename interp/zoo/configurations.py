"""Configurations of the zoo's small models: nothing but sizes is left to choose."""

from __future__ import annotations

from typing import Any

from interp.zoo.words import BOS


def gpt2_config(vocab_size: int, **sizes: int) -> Any:
    """A GPT-2 with an unembedding of its own and no dropout."""
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=vocab_size,
        bos_token_id=BOS,
        eos_token_id=BOS,
        tie_word_embeddings=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **sizes,
    )


def llama_config(vocab_size: int, *, rope_theta: float, **sizes: int) -> Any:
    """A Llama with an unembedding of its own, without biases."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        bos_token_id=BOS,
        eos_token_id=BOS,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        **sizes,
    )
