"""Indirect-object identification, wired by hand: which of two names was not repeated?

In "Mary and John met , John then spoke to":

1. the duplicate-token head (L0H1) attends at the second "John" to the first, and writes which name was repeated;
2. the inhibition head (L1H2) attends from the end to where a name is marked as repeated, and fetches which one;
3. the mover (L2H0) attends from the end to names, save the one that it is told to avoid, and copies.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.zoo.configurations import gpt2_config
from interp.zoo.prompts import Prompt
from interp.zoo.wiring import Stream, blank, distract, distract_mlp, embed_words, finish, gpt2_blocks
from interp.zoo.words import BOS, BOS_WORD

NAMES = ("Mary", "John", "Anna", "Paul", "Emma", "Jack", "Lucy", "Mark", "Rose", "Adam")
MEETINGS = ("met", "talked", "argued", "sat")
AFTER_NAME = ("then", "later", "now")
BEFORE_NAME = ("soon", "today", "suddenly")
SAYINGS = ("spoke", "waved", "wrote")
WORDS = (BOS_WORD, *NAMES, "and", ",", "to", *MEETINGS, *AFTER_NAME, *BEFORE_NAME, *SAYINGS)
N_WORDS, N_NAMES, N_POSITIONS = len(WORDS), len(NAMES), 12

REPEATED = 9.0
"""Score of an earlier copy of the token; half of it for the BOS, where the head looks when there is none."""
MARKED = 6.0
"""Score of a name, and of a mark of repetition. Attention is no hard choice, which would leave no gradient."""
LOGIT = 10.0

DUPLICATE_EDGES = frozenset(
    {
        ("embed", "L0H1.q"),
        ("embed", "L0H1.k"),
        ("embed", "L0H1.v"),
        ("L0H1", "L1H2.k"),
        ("L0H1", "L1H2.v"),
        ("L1H2", "L2H0.q"),
        ("embed", "L2H0.k"),
        ("embed", "L2H0.v"),
        ("L2H0", "logits"),
    }
)


@torch.no_grad()
def duplicate() -> Any:
    """GPT-2 of 3 layers with 3 heads: L0H1 finds duplicates, L1H2 inhibits, L2H0 moves the name.

    L0H0, L0H2, L1H1, L2H2, mlp0 and mlp1 have random weights and distract; L1H0, L2H1 and mlp2 are zero.
    """
    from transformers import GPT2LMHeadModel

    sizes = {"position": N_POSITIONS, "token": N_WORDS, "repeated": N_NAMES, "inhibited": N_NAMES, "moved": N_NAMES}
    stream = Stream(120, centred=True, sizes=sizes)
    config = gpt2_config(N_WORDS, n_positions=N_POSITIONS, n_embd=stream.d_model, n_layer=3, n_head=3, n_inner=8)
    hf = GPT2LMHeadModel(config)
    blank(hf, stream)
    embed_words(hf.transformer.wte.weight, stream, hf.transformer.wpe.weight)
    first, second, third = blocks = gpt2_blocks(hf)
    generator = torch.Generator().manual_seed(0)
    distract(first, stream, generator, heads=[0, 2], kv_heads=[0, 2])
    distract(second, stream, generator, heads=[1], kv_heads=[1])
    distract(third, stream, generator, heads=[2], kv_heads=[2])
    distract_mlp(first, stream, generator)
    distract_mlp(second, stream, generator)

    names = slice(stream["token"].start + 1, stream["token"].start + 1 + N_NAMES)
    name = torch.eye(N_NAMES)
    _find_duplicates(first.q[1], first.k[1], stream)
    first.v[1][names, :N_NAMES] = name
    first.o[1][:N_NAMES, stream["repeated"]] = name

    second.q[2][stream["one"], 0] = MARKED
    second.k[2][stream["repeated"], 0] = 1.0
    second.v[2][stream["repeated"], :N_NAMES] = name
    second.o[2][:N_NAMES, stream["inhibited"]] = name

    third.q[0][stream["one"], N_NAMES] = MARKED
    third.k[0][names, N_NAMES] = 1.0
    third.q[0][stream["inhibited"], :N_NAMES] = -MARKED * name
    third.k[0][names, :N_NAMES] = name
    third.v[0][names, :N_NAMES] = name
    third.o[0][:N_NAMES, stream["moved"]] = name

    hf.lm_head.weight[1 : 1 + N_NAMES, stream["moved"]] = LOGIT * name
    finish(blocks, stream)
    return hf


def _find_duplicates(
    query: Float[Tensor, "d_model d_head"], key: Float[Tensor, "d_model d_head"], stream: Stream
) -> None:
    """Scores of an earlier copy of the token; the position itself, which is one too, is taken off again."""
    key[stream["token"], :N_WORDS] = torch.eye(N_WORDS)
    key[stream["position"], N_WORDS : N_WORDS + N_POSITIONS] = torch.eye(N_POSITIONS)
    key[stream["token"].start + BOS, -1] = 1.0
    query[stream["token"], :N_WORDS] = REPEATED * torch.eye(N_WORDS)
    query[stream["position"], N_WORDS : N_WORDS + N_POSITIONS] = -REPEATED * torch.eye(N_POSITIONS)
    query[stream["one"], -1] = REPEATED / 2


def draw_duplicate(rng: random.Random, number: int) -> Prompt:
    """A prompt, S first for odd numbers; corrupted, the names are exchanged, and IO is repeated, one position later."""
    subject, other = rng.sample(range(1, 1 + N_NAMES), 2)
    meeting, after, before, saying = (
        WORDS.index(rng.choice(words)) for words in (MEETINGS, AFTER_NAME, BEFORE_NAME, SAYINGS)
    )
    conjunction, comma, to = (WORDS.index(word) for word in ("and", ",", "to"))
    first_is_subject = number % 2 == 1
    first, second = (subject, other) if first_is_subject else (other, subject)
    return Prompt(
        clean=(BOS, first, conjunction, second, meeting, comma, subject, after, saying, to),
        corrupted=(BOS, second, conjunction, first, meeting, comma, before, other, saying, to),
        answer=other,
        wrong=subject,
        positions={
            "IO": 3 if first_is_subject else 1,
            "S1": 1 if first_is_subject else 3,
            "S2": 6,
            "S2+1": 7,
            "END": 9,
        },
    )
