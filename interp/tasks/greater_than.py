"""Greater-than: "The war lasted from the year 1743 to the year 17" -> "44".."99"."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from interp.tasks.collect import collect
from interp.tasks.pairs import Pair
from interp.tasks.task import Task
from interp.tasks.vocabulary import continuation_ids, one_token_words, prompt_ids
from interp.tasks.words import LASTING_NOUNS

if TYPE_CHECKING:
    from interp.model import Model

CENTURIES = range(11, 18)


@dataclass(frozen=True)
class Reading:
    """How a year is continued: the prompt ends after `stem` of its digits, the answer is the next `width`."""

    stem: int
    width: int
    rule: str

    def years(self) -> list[int]:
        """Last two digits of the start years in use: each has later and earlier continuations."""
        if self.width == 2:
            return list(range(2, 99))
        if self.stem == 2:
            return list(range(10, 90))
        return [year for year in range(2, 99) if 2 <= year % 10 <= 8]

    def earliest(self, year: str) -> str:
        """The corrupted start year: it ends in 01, as far as the digits that are given allow."""
        return year[: self.stem] + "01"[self.stem - 2 :]

    def prompt(self, start: str, year: str) -> str:
        """The prompt of a start year."""
        return f"{start}{year} to the year {year[: self.stem]}"

    def continuations(self, year: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(right, wrong) continuations for a start year."""
        start = int(year[self.stem : self.stem + self.width])
        later = [f"{value:0{self.width}d}" for value in range(start + 1, 10**self.width)]
        # The same tens digit begins both later and earlier years, so it is neither; elsewhere an equal year is wrong.
        tens_digit = self.stem == 2 and self.width == 1
        not_later = [f"{value:0{self.width}d}" for value in range(start if tens_digit else start + 1)]
        return tuple(later), tuple(not_later)


READINGS = (
    Reading(2, 2, "two digits at once: any later year against any year that is not later"),
    Reading(2, 1, "the tens digit: higher digits against lower ones; the same digit counts for neither"),
    Reading(3, 1, "the last digit, the first three being given: higher digits against digits that are not higher"),
)


def greater_than(model: Model, n: int = 64, *, seed: int = 0, one_length: bool = True) -> Task:
    """Greater-than: a span that starts in one year ends in a later one.

    How the answer is read depends on the tokenizer: as in the paper where years are split in two pairs of digits
    (GPT-2); by the tens digit where digits are single tokens (SmolLM2, Gemma, Qwen; years with tens digit 1..8); by the
    last digit, with "174" given, where digits come in threes (Llama 3). The task's description says which.
    Key positions: NOUN, YY (the token of the start year that is compared), END. Metric: probability difference.

    Args:
        model: whose tokenizer is used.
        n: how many prompt pairs.
        seed: the same seed gives the same task.
        one_length: prompts of one length whose key positions coincide.

    Raises:
        ValueError: if the tokenizer splits years in none of these ways, or n different prompts cannot be found.

    Source: Hanna et al. 2023 (arXiv 2305.00586): nouns, prompt, start year "01" as corruption, metric.
    """
    reading, years = _reading_of(model)
    nouns = one_token_words(model, LASTING_NOUNS, kind="nouns")

    def draw(generator: random.Random) -> Pair:
        noun, year = generator.choice(nouns), generator.choice(years)
        start = f"The {noun} lasted from the year "
        clean, corrupted = reading.prompt(start, year), reading.prompt(start, reading.earliest(year))
        right, wrong = reading.continuations(year)
        marks = {"NOUN": len(f"The {noun}"), "YY": len(start) + reading.stem + reading.width}
        return Pair(clean, corrupted, right, wrong, marks)

    return collect(
        model,
        draw,
        n=n,
        seed=seed,
        one_length=one_length,
        name="greater_than",
        metric="prob_diff",
        description=f"A span of years ends later than it starts; read by {reading.rule}.",
        corruption="the start year ends in 01 (1743 -> 1701, or 1741 where 174 is given): almost every year is later",
    )


def _reading_of(model: Model) -> tuple[Reading, list[str]]:
    """The first reading that this tokenizer allows, and the start years for which it does."""
    for reading in READINGS:
        by_stem: dict[str, list[str]] = {}
        for century in CENTURIES:
            for year in reading.years():
                by_stem.setdefault(f"{century}{year:02d}"[: reading.stem], []).append(f"{century}{year:02d}")
        allowed = [year for stem, years in by_stem.items() for year in _splitting(model, reading, stem, years)]
        if allowed:
            return reading, allowed
    shown = model.to_str_tokens("the year 1743")
    raise ValueError(f"greater_than needs years split in two pairs, single digits or threes; this tokenizer: {shown}")


def _splitting(model: Model, reading: Reading, stem: str, years: list[str]) -> list[str]:
    """The years whose tokens are those of the stem, then one token for the digits to be predicted.

    None, if some continuation of the stem is not one token.
    """
    before = prompt_ids(model, f"the year {stem}")
    digits = [f"{value:0{reading.width}d}" for value in range(10**reading.width)]
    following = {one: continuation_ids(model, f"the year {stem}", one) for one in digits}
    if any(len(ids) != 1 for ids in following.values()):
        return []

    def splits(year: str) -> bool:
        whole = prompt_ids(model, f"the year {year}")
        expected = before + following[year[reading.stem : reading.stem + reading.width]]
        return whole[: len(expected)] == expected

    return [year for year in years if splits(year) and splits(reading.earliest(year))]
