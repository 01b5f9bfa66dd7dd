"""Gendered pronoun: "So Mary is such a good friend, isn't" -> " she"."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from interp.tasks.collect import collect
from interp.tasks.pairs import Pair
from interp.tasks.task import Task
from interp.tasks.template import fill
from interp.tasks.vocabulary import one_token_words
from interp.tasks.words import FEMALE_NAMES, MALE_NAMES

if TYPE_CHECKING:
    from interp.model import Model

TEMPLATES = (
    "So {name} is such a {quality} {role}, isn't",
    "Well, {name} is a really {quality} {role}, isn't",
    "I think {name} is a very {quality} {role}, isn't",
)
QUALITIES = ("good", "great", "nice", "kind", "funny", "smart", "friendly", "strong")
ROLES = ("friend", "person", "teacher", "student", "neighbor", "cook", "doctor", "writer", "singer")


def gendered_pronoun(model: Model, n: int = 64, *, seed: int = 0, one_length: bool = True) -> Task:
    """Gendered pronoun: a tag question takes "he" or "she" from a first name.

    Key positions: NAME, END. Answer: " he" or " she"; wrong: the other; metric: logit difference.

    Args:
        model: whose tokenizer is used.
        n: how many prompt pairs.
        seed: the same seed gives the same task.
        one_length: prompts of one length whose key positions coincide.

    Raises:
        ValueError: if too few names are one token, or n different prompts cannot be found.

    Source: Mathwin et al. 2023, "Identifying a preliminary circuit for predicting gendered pronouns in GPT-2 small".
    """
    one_token_words(model, ("he", "she"), kind="pronouns", at_least=2)
    names = {
        "he": one_token_words(model, MALE_NAMES, kind="men's names"),
        "she": one_token_words(model, FEMALE_NAMES, kind="women's names"),
    }
    qualities = one_token_words(model, QUALITIES, kind="adjectives")
    roles = one_token_words(model, ROLES, kind="nouns")

    def draw(generator: random.Random) -> Pair:
        right, wrong = generator.sample(("he", "she"), 2)
        template = generator.choice(TEMPLATES)
        words = {"quality": generator.choice(qualities), "role": generator.choice(roles)}
        clean, ends = fill(template, words | {"name": generator.choice(names[right])})
        corrupted, _ = fill(template, words | {"name": generator.choice(names[wrong])})
        return Pair(clean, corrupted, (f" {right}",), (f" {wrong}",), {"NAME": ends["name"][0]})

    return collect(
        model,
        draw,
        n=n,
        seed=seed,
        one_length=one_length,
        name="gendered_pronoun",
        metric="logit_diff",
        description="A tag question takes he or she from a first name.",
        corruption="the name becomes one of the other gender",
    )
