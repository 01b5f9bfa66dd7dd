"""Docstring: which argument does the next ":param" line describe?"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from interp.tasks.collect import collect
from interp.tasks.pairs import Pair
from interp.tasks.task import Task
from interp.tasks.template import fill
from interp.tasks.vocabulary import one_token_words
from interp.tasks.words import ARGUMENT_NAMES, DESCRIPTION_NOUNS

if TYPE_CHECKING:
    from interp.model import Model

# Two arguments before, three that the docstring follows, one after; reStructuredText style.
TEMPLATE = '''
def {function}(self, {before}, {ahead}, {A_def}, {B_def}, {C_def}, {after}):
    """{word1} {word2} {word3}

    :param {A_doc}: {word4} {word5}
    :param {B_doc}: {word6} {word7}
    :param'''


def docstring(model: Model, n: int = 64, *, seed: int = 0, one_length: bool = True) -> Task:
    """Docstring: the next ":param" names the next argument of the function.

    Key positions: A_def, B_def, C_def (arguments in the definition), A_doc, B_doc (already described), END. Answer: the
    third argument; wrong: every other argument of the clean and the corrupted prompt; metric: logit difference (against
    the mean of the wrong ones).

    Args:
        model: whose tokenizer is used.
        n: how many prompt pairs.
        seed: the same seed gives the same task.
        one_length: prompts of one length whose key positions coincide.

    Raises:
        ValueError: if too few argument names are one token, or n different prompts cannot be found.

    Source: Heimersheim & Janiak 2023, "A circuit for Python docstrings in a 4-layer attention-only transformer"; sizes
    (2 arguments before, 3 followed, 1 after) and `random_random` corruption of Conmy et al. 2023 (arXiv 2304.14997).
    """
    names = one_token_words(model, ARGUMENT_NAMES, kind="argument names", at_least=12)
    nouns = one_token_words(model, DESCRIPTION_NOUNS, kind="nouns", at_least=7)

    def draw(generator: random.Random) -> Pair:
        function, before, ahead, after, a, b, c, *others = generator.sample(names, 12)
        words = {f"word{place}": noun for place, noun in enumerate(generator.sample(nouns, 7), start=1)}
        words |= {"function": function, "before": before, "ahead": ahead, "after": after}
        clean, ends = fill(TEMPLATE, words | {"A_def": a, "B_def": b, "C_def": c, "A_doc": a, "B_doc": b})
        slots = ("A_def", "B_def", "C_def", "A_doc", "B_doc")
        corrupted, _ = fill(TEMPLATE, words | dict(zip(slots, others, strict=True)))
        wrong = tuple(f" {one}" for one in (before, ahead, after, a, b, *others))
        return Pair(clean, corrupted, (f" {c}",), wrong, {slot: ends[slot][0] for slot in slots})

    return collect(
        model,
        draw,
        n=n,
        seed=seed,
        one_length=one_length,
        name="docstring",
        metric="logit_diff",
        description="The next :param line of a docstring names the next argument of the function.",
        corruption="the three arguments in the definition and the two in the docstring become five unrelated names",
    )
