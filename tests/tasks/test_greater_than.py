"""Greater-than: how the answer is read follows how years are split."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable

import pytest

import interp
from interp import tasks
from interp.metrics import PADDING

YEARS = re.compile(r"the year (\d{4}) to the year (\d+)$")


@pytest.mark.parametrize(
    ("kind", "given", "width"), [("pairs", 2, 2), ("single", 2, 1), ("threes", 3, 1), ("metaspace", 2, 1)]
)
def test_answers_are_the_later_years(kind: str, given: int, width: int, tokenised_as: Callable[[str], interp.Model]):
    model = tokenised_as(kind)
    task = tasks.greater_than(model, n=16)
    for row, text in enumerate(task.clean_text):
        year, stem = YEARS.search(text).groups()
        start = int(year[given : given + width])
        right, wrong = (
            {int(model.to_str_tokens([token])[0]) for token in ids[row].tolist() if token != PADDING}
            for ids in (task.answers, task.wrong)
        )
        assert stem == year[:given]
        assert right == set(range(start + 1, 10**width))
        # By the tens digit, years with an equal digit may be later or not: they are neither.
        assert wrong == set(range(start if (given, width) == (2, 1) else start + 1))
        assert task.str_tokens[row][int(task.positions["YY"][row])] == year[given : given + width]


@pytest.mark.parametrize("kind", ["pairs", "single", "threes"])
def test_corrupted_years_end_in_01(kind: str, tokenised_as: Callable[[str], interp.Model]):
    for clean, corrupted in zip(
        *(getattr(tasks.greater_than(tokenised_as(kind), n=12), part) for part in ("clean_text", "corrupted_text")),
        strict=True,
    ):
        (year, stem), (start, same_stem) = YEARS.search(clean).groups(), YEARS.search(corrupted).groups()
        assert stem == same_stem
        assert start == (f"{year[:3]}1" if kind == "threes" else f"{year[:2]}01")


def test_metric_and_reading_are_stated(tokenised_as: Callable[[str], interp.Model]):
    task = tasks.greater_than(tokenised_as("single"), n=2)
    assert task.metric == "prob_diff"
    assert "tens digit" in task.description


def test_a_tokenizer_that_splits_years_otherwise(tokenised_as: Callable[[str], interp.Model], monkeypatch):
    monkeypatch.setattr(importlib.import_module("interp.tasks.greater_than"), "CENTURIES", range(0))
    with pytest.raises(ValueError, match="greater_than needs years split in two pairs, single digits or threes"):
        tasks.greater_than(tokenised_as("single"))
