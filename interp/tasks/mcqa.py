"""Multiple choice with letter labels: the answer is the letter of the option that a sentence states."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from interp.tasks.collect import collect
from interp.tasks.pairs import Pair
from interp.tasks.task import Task
from interp.tasks.template import fill
from interp.tasks.vocabulary import one_token_words
from interp.tasks.words import COLORS, SMALL_THINGS

if TYPE_CHECKING:
    from interp.model import Model

LETTERS = ("A", "B", "C", "D")
TEMPLATE = (
    "The {thing} is {color}. What color is the {thing}?\n"
    "{label0}. {option0}\n{label1}. {option1}\n{label2}. {option2}\n{label3}. {option3}\nAnswer:"
)

CORRUPTIONS = {
    "answer": "the sentence states the colour of another option",
    "letters": "the labels are in another order, so that the same option has another letter",
}


def mcqa(
    model: Model,
    n: int = 64,
    *,
    seed: int = 0,
    corruption: Literal["answer", "letters"] = "answer",
    one_length: bool = True,
) -> Task:
    """Multiple choice: which letter labels the option that was stated?

    One worked question comes first, so that the model knows to answer with a letter. Key positions: COLOR (in the
    sentence), LABEL and OPTION (the right option and its letter), LABEL1 to LABEL4 (all letters), END. Answer: the
    letter; wrong: the three others; metric: logit difference against their mean, so that chance is an accuracy of one
    quarter. Small models stay near chance (in the second source, only the 70B model of its family did the task),
    SmolLM2-135M among them: look at `interp.tasks.accuracy` first.

    Args:
        model: whose tokenizer is used.
        n: how many prompt pairs.
        seed: the same seed gives the same task.
        corruption: "answer" states another option's colour; "letters" permutes the labels (none keeps its place).
        one_length: prompts of one length with COLOR at one position (the right option varies).

    Raises:
        ValueError: if too few colours or things are one token, or n different prompts cannot be found.

    Source: copied colours after Wiegreffe et al. 2024 (arXiv 2407.15018); corruptions after Lieberum et al. 2023
    (arXiv 2307.09458).
    """
    if corruption not in CORRUPTIONS:
        raise ValueError(f"corruption is {corruption!r}; it is one of {', '.join(CORRUPTIONS)}")
    one_token_words(model, LETTERS, kind="letters", at_least=len(LETTERS))
    colors = one_token_words(model, COLORS, kind="colours", at_least=len(LETTERS))
    things = one_token_words(model, SMALL_THINGS, kind="things", at_least=2)

    def draw(generator: random.Random) -> Pair:
        solved_thing, thing = generator.sample(things, 2)
        solved_options, options = generator.sample(colors, 4), generator.sample(colors, 4)
        solved, right = generator.randrange(4), generator.randrange(4)
        example, _ = fill(TEMPLATE, _words(solved_thing, solved_options, solved))
        opening = f"{example} {LETTERS[solved]}\n\n"
        clean, ends = fill(TEMPLATE, _words(thing, options, right))
        if corruption == "answer":
            other = generator.choice([place for place in range(4) if place != right])
            corrupted, _ = fill(TEMPLATE, _words(thing, options, other))
        else:
            corrupted, _ = fill(TEMPLATE, _words(thing, options, right, _rearranged(generator)))
        slots = {"COLOR": "color", "LABEL": f"label{right}", "OPTION": f"option{right}"}
        slots |= {f"LABEL{place + 1}": f"label{place}" for place in range(len(LETTERS))}
        return Pair(
            opening + clean,
            opening + corrupted,
            (f" {LETTERS[right]}",),
            tuple(f" {letter}" for letter in LETTERS if letter != LETTERS[right]),
            {name: len(opening) + ends[slot][0] for name, slot in slots.items()},
        )

    return collect(
        model,
        draw,
        aligned=("COLOR",),
        n=n,
        seed=seed,
        one_length=one_length,
        name="mcqa",
        metric="logit_diff",
        description="Which letter labels the option that was stated?",
        corruption=CORRUPTIONS[corruption],
    )


def _words(thing: str, options: Sequence[str], stated: int, labels: Sequence[str] = LETTERS) -> dict[str, str]:
    """What fills the template: options in order, of which one is stated."""
    words = {"thing": thing, "color": options[stated]}
    words |= {f"option{place}": option for place, option in enumerate(options)}
    return words | {f"label{place}": label for place, label in enumerate(labels)}


def _rearranged(generator: random.Random) -> list[str]:
    """The letters in an order in which none keeps its place."""
    while True:
        labels = generator.sample(LETTERS, len(LETTERS))
        if all(label != letter for label, letter in zip(labels, LETTERS, strict=True)):
            return labels
