"""Colored objects: one worked question, then "What color is the pen?" about three coloured things."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from interp.tasks.collect import collect
from interp.tasks.pairs import Pair
from interp.tasks.task import Task
from interp.tasks.template import fill
from interp.tasks.vocabulary import one_token_words
from interp.tasks.words import COLORS, SMALL_THINGS, SURFACES

if TYPE_CHECKING:
    from interp.model import Model

OPENERS = ("I see", "there is", "you see")
SCENE = (
    "Q: On the {surface}, {opener} {article1} {color1} {thing1}, {article2} {color2} {thing2}, "
    "and {article3} {color3} {thing3}. What color is the {asked}?\nA:"
)


def colored_objects(model: Model, n: int = 64, *, seed: int = 0, one_length: bool = True) -> Task:
    """Colored objects: which colour has the thing that is asked for?

    A worked question comes first; the second asks for one of three things. Key positions: COLOR and OBJECT (the thing
    asked for, where it is described), WRONG and THIRD (the colours of the other two, WRONG that of the wrong answer),
    ASKED (in the question), END. Answer: its colour, capitalised; wrong: the colour that the corrupted question asks
    for; metric: logit difference. (The third colour is neither, so that chance is an accuracy of one half.) Small
    models stay near chance, SmolLM2-135M among them: see `interp.tasks.accuracy` first.

    Args:
        model: whose tokenizer is used.
        n: how many prompt pairs.
        seed: the same seed gives the same task.
        one_length: prompts of one length with ASKED at one position (which of the three things it is varies).

    Raises:
        ValueError: if too few colours or things are one token, or n different prompts cannot be found.

    Source: Merullo et al. 2024 (arXiv 2310.08744), after BIG-bench (Srivastava et al. 2022).
    """
    capitalised = one_token_words(model, [color.capitalize() for color in COLORS], kind="colours", at_least=3)
    colors = one_token_words(model, [color.lower() for color in capitalised], kind="colours", at_least=3)
    things = one_token_words(model, SMALL_THINGS, kind="things", at_least=3)
    surfaces = one_token_words(model, SURFACES, kind="surfaces")

    def scene(generator: random.Random) -> dict[str, str]:
        words = {"surface": generator.choice(surfaces), "opener": generator.choice(OPENERS)}
        drawn = zip(generator.sample(colors, 3), generator.sample(things, 3), strict=True)
        for place, (color, thing) in enumerate(drawn, start=1):
            words |= {f"article{place}": _article(color), f"color{place}": color, f"thing{place}": thing}
        return words

    def draw(generator: random.Random) -> Pair:
        example, question = scene(generator), scene(generator)
        shown = generator.randint(1, 3)
        asked, other = generator.sample((1, 2, 3), 2)
        third = 6 - asked - other
        solved, _ = fill(SCENE, example | {"asked": example[f"thing{shown}"]})
        opening = f"{solved} {example[f'color{shown}'].capitalize()}\n"
        clean, ends = fill(SCENE, question | {"asked": question[f"thing{asked}"]})
        corrupted, _ = fill(SCENE, question | {"asked": question[f"thing{other}"]})
        slots = {"COLOR": f"color{asked}", "WRONG": f"color{other}", "THIRD": f"color{third}"}
        slots |= {"OBJECT": f"thing{asked}", "ASKED": "asked"}
        return Pair(
            opening + clean,
            opening + corrupted,
            (f" {question[f'color{asked}'].capitalize()}",),
            (f" {question[f'color{other}'].capitalize()}",),
            {name: len(opening) + ends[slot][0] for name, slot in slots.items()},
        )

    return collect(
        model,
        draw,
        aligned=("ASKED",),
        n=n,
        seed=seed,
        one_length=one_length,
        name="colored_objects",
        metric="logit_diff",
        description="Which colour has the thing that is asked for?",
        corruption="the question asks for another of the three things",
    )


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
