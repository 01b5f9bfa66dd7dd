"""Induction: random tokens, repeated: [A][B] ... [A] -> [B]."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from interp.tasks.collect import collect
from interp.tasks.pairs import Pair
from interp.tasks.task import Task
from interp.tasks.vocabulary import continuation_ids

if TYPE_CHECKING:
    from interp.model import Model

POOL = 2000
"""How many different tokens a task draws from."""


def induction(model: Model, n: int = 64, *, seed: int = 0, length: int = 20, one_length: bool = True) -> Task:
    """Induction: a sequence of random tokens is repeated, the second copy stops before its last token.

    The tokens are words (letters after a space) drawn from the whole vocabulary, all different within a prompt. Key
    positions: A1 and B1 (the token before the answer and the answer, in the first copy), END (the repeated A). Wrong:
    the token that takes the place of B1 in the corrupted prompt; metric: logit difference.

    Args:
        model: whose tokenizer is used.
        n: how many prompt pairs.
        seed: the same seed gives the same task.
        length: tokens in the repeated sequence, at least 2.
        one_length: has no effect here (every prompt is 2 · length − 1 tokens); it is taken by every task.

    Raises:
        ValueError: if length is below 2, or the vocabulary has too few words of one token.

    Source: Olsson et al. 2022 (arXiv 2209.11895): repeated random tokens.
    """
    if length < 2:
        raise ValueError(f"length is {length}; the repeated sequence needs at least 2 tokens")
    pool = _vocabulary_words(model, seed=seed, at_least=length + 1)

    def draw(generator: random.Random) -> Pair:
        *sequence, other = generator.sample(pool, length + 1)
        stem, last = "".join(sequence[:-1]), sequence[-1]
        return Pair(
            clean=stem + last + stem,
            corrupted=stem + other + stem,
            answers=(last,),
            wrong=(other,),
            marks={"A1": len(stem), "B1": len(stem + last)},
        )

    return collect(
        model,
        draw,
        n=n,
        seed=seed,
        one_length=one_length,
        name="induction",
        metric="logit_diff",
        description="Random tokens are repeated; the next token is the one that followed before.",
        corruption="in the first copy, the token to be predicted becomes another random token",
    )


def _vocabulary_words(model: Model, *, seed: int, at_least: int) -> list[str]:
    """Random one-token words of the tokenizer's own vocabulary, each with a space in front."""
    ids = list(range(len(model.tokenizer)))
    random.Random(f"induction vocabulary {seed}").shuffle(ids)
    pool: dict[str, None] = {}
    for token in ids:
        word = model.to_str_tokens([token])[0].strip()
        if word.isascii() and word.isalpha() and len(continuation_ids(model, " the", f" {word}")) == 1:
            pool[f" {word}"] = None
        if len(pool) == POOL:
            break
    if len(pool) < at_least:
        raise ValueError(
            f"induction needs {at_least} words that are one token; the tokenizer of {model.name} has {len(pool)}"
        )
    return list(pool)
