"""Indirect-object identification: "When Mary and John went to the store, John gave a drink to" -> " Mary"."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from interp.tasks.collect import collect
from interp.tasks.pairs import Pair
from interp.tasks.task import Task
from interp.tasks.template import fill
from interp.tasks.vocabulary import one_token_words
from interp.tasks.words import GIFTS, NAMES, PLACES

if TYPE_CHECKING:
    from interp.model import Model

# Wang et al. 2022, figure 10: one template for both orders, ABBA (first = IO) and BABA (first = S).
TEMPLATES = (
    "Then, {first} and {second} went to the {place}. {S2} gave a {gift} to",
    "Then, {first} and {second} had a lot of fun at the {place}. {S2} gave a {gift} to",
    "Then, {first} and {second} were working at the {place}. {S2} decided to give a {gift} to",
    "Then, {first} and {second} were thinking about going to the {place}. {S2} wanted to give a {gift} to",
    "Then, {first} and {second} had a long argument, and afterwards {S2} said to",
    "After {first} and {second} went to the {place}, {S2} gave a {gift} to",
    "When {first} and {second} got a {gift} at the {place}, {S2} decided to give it to",
    "When {first} and {second} got a {gift} at the {place}, {S2} decided to give the {gift} to",
    "While {first} and {second} were working at the {place}, {S2} gave a {gift} to",
    "While {first} and {second} were commuting to the {place}, {S2} gave a {gift} to",
    "After the lunch, {first} and {second} went to the {place}. {S2} gave a {gift} to",
    "Afterwards, {first} and {second} went to the {place}. {S2} gave a {gift} to",
    "Then, {first} and {second} had a long argument. Afterwards {S2} said to",
    "The {place} {first} and {second} went to had a {gift}. {S2} gave it to",
    "Friends {first} and {second} found a {gift} at the {place}. {S2} gave it to",
)

CORRUPTIONS = {
    "s2": "the second S is replaced by IO, so that S becomes the right answer",
    "abc": "the three names are replaced by three others, so that no name is repeated",
}


def ioi(
    model: Model,
    n: int = 64,
    *,
    seed: int = 0,
    corruption: Literal["s2", "abc"] = "s2",
    templates: Sequence[int] | None = None,
    orders: Sequence[Literal["ABBA", "BABA"]] = ("ABBA", "BABA"),
    one_length: bool = True,
) -> Task:
    """Indirect-object identification: which of two names was not repeated?

    Key positions: IO, S1, S1+1, S2, END. Answer: IO; wrong: S; metric: logit difference.

    Args:
        model: whose tokenizer is used.
        n: how many prompt pairs.
        seed: the same seed gives the same task.
        corruption: "s2" replaces the second S by IO; "abc" replaces the names by three others.
        templates: which of the paper's 15, by their number; all by default.
        orders: ABBA names IO first, BABA names S first.
        one_length: prompts of one length with the two names and S2 at the same positions (in ABBA and BABA order), or
            all templates together.

    Raises:
        ValueError: if too few names are one token, or n different prompts cannot be found.

    Source: Wang et al. 2022 (arXiv 2211.00593): templates, names and ABC corruption; Merullo et al. 2024
    (arXiv 2310.08744): S2 -> IO.
    """
    if corruption not in CORRUPTIONS:
        raise ValueError(f"corruption is {corruption!r}; it is one of {', '.join(CORRUPTIONS)}")
    names = one_token_words(model, NAMES, kind="names", at_least=5)
    places = one_token_words(model, PLACES, kind="places")
    gifts = one_token_words(model, GIFTS, kind="objects")
    chosen = [TEMPLATES[number] for number in (templates if templates is not None else range(len(TEMPLATES)))]

    def draw(generator: random.Random) -> Pair:
        template, order = generator.choice(chosen), generator.choice(list(orders))
        io, s, *others = generator.sample(names, 5)
        first, second = (io, s) if order == "ABBA" else (s, io)
        words = {"place": generator.choice(places), "gift": generator.choice(gifts)}
        clean, ends = fill(template, words | {"first": first, "second": second, "S2": s})
        first_other, second_other, s2_other = others if corruption == "abc" else (first, second, io)
        corrupted, _ = fill(template, words | {"first": first_other, "second": second_other, "S2": s2_other})
        io_end, s1_end = (ends["first"][0], ends["second"][0])[:: 1 if order == "ABBA" else -1]
        marks = {"IO": io_end, "S1": s1_end, "S1+1": _next_word_end(clean, s1_end), "S2": ends["S2"][0]}
        return Pair(clean, corrupted, (f" {io}",), (f" {s}",), marks)

    return collect(
        model,
        draw,
        aligned=("IO", "S1", "S2"),
        n=n,
        seed=seed,
        one_length=one_length,
        name="ioi",
        metric="logit_diff",
        description="Which of two names was not repeated?",
        corruption=CORRUPTIONS[corruption],
    )


def _next_word_end(text: str, end: int) -> int:
    """Where the word after the one that ends at `end` ends."""
    return text.index(" ", end + 1)
