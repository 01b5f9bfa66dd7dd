"""Induction, wired by hand: in a GPT-2 without MLPs, and in a Llama where an MLP makes the answer of what was copied.

Both find what followed the last token before: a head in layer 0 writes at each position which token stands before it, a
head in layer 1 looks for the position that is preceded by the current token and copies what stands there.
"""

from __future__ import annotations

from typing import Any

import torch

from interp.zoo.wiring import (
    Block,
    Stream,
    blank,
    distract,
    distract_mlp,
    finish,
    gpt2_blocks,
    llama_blocks,
)
from interp.zoo.words import BOS, LETTERS

MATCH = 6.0
"""Score of the position that the induction head looks for; the others are near 0. Not so high that its attention is a
hard choice: gradients would vanish."""
LOGIT = 10.0
"""Logit of a token that is written at length 1."""

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
LLAMA_INDUCTION_EDGES = frozenset(
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
    """GPT-2, attention only: L0H2 looks at the token before, L1H1 is the induction head; the other heads distract.

    L0H1 and L1H3 are zero.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"position": N_POSITIONS, "token": N_WORDS, "previous": N_WORDS, "copied": N_WORDS}
    stream = Stream(112, centred=True, sizes=sizes)
    hf = GPT2LMHeadModel(gpt2_config(N_WORDS, n_positions=N_POSITIONS, n_embd=112, n_layer=2, n_head=4, n_inner=4))
    blank(hf, stream)
    embed(hf.transformer.wte.weight, stream)
    positions(hf.transformer.wpe.weight, stream)
    blocks = gpt2_blocks(hf)
    generator = torch.Generator().manual_seed(0)
    distract(blocks[0], stream, generator, heads=[0, 3], kv_heads=[0, 3])
    distract(blocks[1], stream, generator, heads=[0, 2], kv_heads=[0, 2])

    place = torch.eye(N_POSITIONS)
    # The query at position i is the key of position i − 1; the first position has none, and nothing but itself to see.
    blocks[0].q[2][stream["position"], :N_POSITIONS] = 12.0 * place.roll(-1, dims=1).tril()
    blocks[0].k[2][stream["position"], :N_POSITIONS] = place
    copy_words(blocks[0], stream, head=2, kv_head=2, into="previous")
    look_for_previous(blocks[1], stream, head=1, kv_head=1, slots=list(range(N_WORDS)))
    copy_words(blocks[1], stream, head=1, kv_head=1, into="copied")
    hf.lm_head.weight[:, stream["copied"]] = LOGIT * torch.eye(N_WORDS)
    finish(blocks, stream)
    return hf


def gpt2_config(vocab_size: int, **sizes: int) -> Any:
    """Configuration of a small GPT-2 with an unembedding of its own and no dropout."""
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
