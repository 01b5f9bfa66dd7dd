"""Induction, wired by hand: in a GPT-2 without MLPs, and in a Llama where an MLP makes the answer of what was copied.

Both find what followed the last token before: a head in layer 0 writes at each position which token stands before it, a
head in layer 1 looks for the position that is preceded by the current token and copies what stands there.
"""

from __future__ import annotations

from typing import Any

import torch

from interp.zoo.configurations import gpt2_config, llama_config
from interp.zoo.wiring import (
    Block,
    Stream,
    blank,
    distract,
    distract_mlp,
    embed_words,
    finish,
    gpt2_blocks,
    llama_blocks,
)
from interp.zoo.words import LETTERS

MATCH = 6.0
"""Score of the position that the induction head looks for; the others are near 0. Attention is no hard choice, which
would leave no gradient."""
LOGIT = 10.0
"""Logit of a token that is written at length 1."""
ROPE_THETA = 1e8
"""Frequencies from 1 down to where a prompt is no rotation at all."""

N_WORDS = len(LETTERS)
N_POSITIONS = 24

INDUCTION_EDGES = frozenset(
    {
        ("embed", "L0H2.v"),
        ("L0H2", "L1H1.k"),
        ("embed", "L1H1.q"),
        ("embed", "L1H1.v"),
        ("L1H1", "logits"),
    }
)
LLAMA_EDGES = frozenset(
    {
        ("embed", "L0H1.v"),
        ("L0H3", "L1H0.k"),
        ("embed", "L1H1.q"),
        ("embed", "L1H0.v"),
        ("L1H1", "mlp1"),
        ("mlp1", "logits"),
    }
)


@torch.no_grad()
def induction() -> Any:
    """GPT-2, attention only: L0H2 looks at the token before, L1H1 is the induction head.

    L0H0, L0H3, L1H0 and L1H2 have random weights and distract; L0H1, L1H3 and the MLPs are zero.
    """
    from transformers import GPT2LMHeadModel

    sizes = {"position": N_POSITIONS, "token": N_WORDS, "previous": N_WORDS, "copied": N_WORDS}
    stream = Stream(112, centred=True, sizes=sizes)
    config = gpt2_config(N_WORDS, n_positions=N_POSITIONS, n_embd=stream.d_model, n_layer=2, n_head=4, n_inner=4)
    hf = GPT2LMHeadModel(config)
    blank(hf, stream)
    embed_words(hf.transformer.wte.weight, stream, hf.transformer.wpe.weight)
    first, second = blocks = gpt2_blocks(hf)
    generator = torch.Generator().manual_seed(0)
    distract(first, stream, generator, heads=[0, 3], kv_heads=[0, 3])
    distract(second, stream, generator, heads=[0, 2], kv_heads=[0, 2])

    # The query at position i is the key of position i − 1; the first position has nothing but itself to see.
    place = torch.eye(N_POSITIONS)
    first.q[2][stream["position"], :N_POSITIONS] = 2 * MATCH * place.roll(-1, dims=1).tril()
    first.k[2][stream["position"], :N_POSITIONS] = place
    _copy(first, stream, head=2, kv_head=2, into="previous")
    _match_previous(second, stream, head=1, kv_head=1, slots=list(range(N_WORDS)))
    _copy(second, stream, head=1, kv_head=1, into="copied")
    hf.lm_head.weight[:, stream["copied"]] = LOGIT * torch.eye(N_WORDS)
    finish(blocks, stream)
    return hf


@torch.no_grad()
def llama_induction() -> Any:
    """Llama (RMSNorm, RoPE, 4 heads on 2 key/value heads, gated MLP) that answers with the successor of what it copies.

    L0H3 looks at the token before (with L0H2 on key/value head 1), L1H1 is the induction head (with L1H0 on key/value
    head 0), mlp1 turns the copied token into the next of the vocabulary. All other heads, their key/value heads and
    mlp0 have random weights and distract.
    """
    from transformers import LlamaForCausalLM

    sizes = {"token": N_WORDS, "previous": N_WORDS, "copied": N_WORDS, "successor": N_WORDS}
    stream = Stream(112, centred=False, sizes=sizes)
    config = llama_config(
        N_WORDS,
        rope_theta=ROPE_THETA,
        hidden_size=stream.d_model,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=2 * N_WORDS,
        intermediate_size=N_WORDS,
        max_position_embeddings=64,
    )
    hf = LlamaForCausalLM(config)
    blank(hf, stream)
    embed_words(hf.model.embed_tokens.weight, stream)
    first, second = blocks = llama_blocks(hf.model)
    generator = torch.Generator().manual_seed(0)
    distract(first, stream, generator, heads=[0, 1, 2], kv_heads=[0])
    distract(second, stream, generator, heads=[0, 2, 3], kv_heads=[1])
    distract_mlp(first, stream, generator)

    _look_one_back(first, stream, head=3, kv_head=1)
    _copy(first, stream, head=3, kv_head=1, into="previous")
    # The slots that turn least with position: the lower half of the frequencies, each in two slots.
    slots = [*range(N_WORDS // 2, N_WORDS), *range(N_WORDS + N_WORDS // 2, 2 * N_WORDS)]
    _match_previous(second, stream, head=1, kv_head=0, slots=slots)
    _copy(second, stream, head=1, kv_head=0, into="copied")
    _succeed(second, stream)
    hf.lm_head.weight[:, stream["successor"]] = LOGIT * torch.eye(N_WORDS)
    finish(blocks, stream)
    return hf


def _copy(block: Block, stream: Stream, *, head: int, kv_head: int, into: str) -> None:
    """The head writes which tokens it attends to."""
    block.v[kv_head][stream["token"], :N_WORDS] = torch.eye(N_WORDS)
    block.o[head][:N_WORDS, stream[into]] = torch.eye(N_WORDS)


def _match_previous(block: Block, stream: Stream, *, head: int, kv_head: int, slots: list[int]) -> None:
    """The head attends to positions that are preceded by the token at the query."""
    tokens, previous = (torch.arange(stream.d_model)[stream[part], None] for part in ("token", "previous"))
    block.q[head][tokens, slots] = MATCH * torch.eye(N_WORDS)
    block.k[kv_head][previous, slots] = torch.eye(N_WORDS)


def _look_one_back(block: Block, stream: Stream, *, head: int, kv_head: int) -> None:
    """The head attends to the position before, by rotation alone: the score is Σ cos(ω (distance − 1)) over fast ω."""
    d_head = block.q.shape[-1]
    fast = torch.arange(4)
    omega = ROPE_THETA ** (-2 * fast / d_head)
    block.k[kv_head][stream["one"], fast] = 1.0
    block.q[head][stream["one"], fast] = 2 * MATCH * omega.cos()
    block.q[head][stream["one"], d_head // 2 + fast] = -2 * MATCH * omega.sin()


def _succeed(block: Block, stream: Stream) -> None:
    """Neuron i opens where token i was copied and writes the token after it; the BOS has no successor."""
    assert block.mlp_up is not None
    block.mlp_in[stream["copied"]] = 8.0 * torch.eye(N_WORDS)
    block.mlp_in[stream["one"]] = -4.0
    block.mlp_up[stream["copied"]] = torch.eye(N_WORDS)
    words = torch.arange(1, N_WORDS)
    # 0.3 undoes the gate, which opens to about 3.5.
    block.mlp_out[words, stream["successor"].start + words % (N_WORDS - 1) + 1] = 0.3
