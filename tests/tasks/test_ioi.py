"""IOI: roles, orders and corruptions."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import interp
from interp import tasks
from interp.tasks.ioi import TEMPLATES


def names_at(task: tasks.Task, tokens: tuple[tuple[str, ...], ...]) -> list[tuple[str, str, str]]:
    roles = [task.positions[role].tolist() for role in ("IO", "S1", "S2")]
    return [(row[io], row[s1], row[s2]) for row, io, s1, s2 in zip(tokens, *roles, strict=True)]


@pytest.mark.parametrize("kind", ["single", "threes"])
def test_roles(kind: str, tokenised_as: Callable[[str], interp.Model]):
    model = tokenised_as(kind)
    task = tasks.ioi(model, n=40, one_length=False)
    for row, (io, s1, s2) in enumerate(names_at(task, task.str_tokens)):
        assert s1 == s2 != io
        assert model.to_str_tokens(task.answers[row]) == [io]
        assert model.to_str_tokens(task.wrong[row]) == [s1]
    assert (task.positions["S1+1"] == task.positions["S1"] + 1).all()
    assert (task.first_difference == task.positions["S2"]).all()


def test_s2_corruption_repeats_io(tokenised_as: Callable[[str], interp.Model]):
    task = tasks.ioi(tokenised_as("single"), n=20)
    for (io, s1, _), corrupted in zip(
        names_at(task, task.str_tokens), names_at(task, task.corrupted_str_tokens), strict=True
    ):
        assert corrupted == (io, s1, io)
    assert (task.clean != task.corrupted).sum(dim=1).tolist() == [1] * 20


def test_abc_corruption_repeats_no_name(tokenised_as: Callable[[str], interp.Model]):
    task = tasks.ioi(tokenised_as("single"), n=20, corruption="abc")
    for clean, corrupted in zip(
        names_at(task, task.str_tokens), names_at(task, task.corrupted_str_tokens), strict=True
    ):
        assert len({*clean, *corrupted}) == 5
    assert (task.clean != task.corrupted).sum(dim=1).tolist() == [3] * 20


def test_one_length_keeps_both_orders_with_roles_in_place(tokenised_as: Callable[[str], interp.Model]):
    task = tasks.ioi(tokenised_as("single"), n=40)
    places = {(io, s1) for io, s1 in zip(task.positions["IO"].tolist(), task.positions["S1"].tolist(), strict=True)}
    assert len(places) == 2
    assert len(set(task.positions["S2"].tolist())) == 1


def test_orders_and_templates(tokenised_as: Callable[[str], interp.Model]):
    task = tasks.ioi(tokenised_as("single"), n=10, orders=("ABBA",), templates=(4,))
    assert (task.positions["IO"] < task.positions["S1"]).all()
    assert all("had a long argument, and afterwards" in text for text in task.clean_text)


def test_templates_are_fifteen_different_ones():
    assert len(set(TEMPLATES)) == 15


def test_unknown_corruption(tokenised_as: Callable[[str], interp.Model]):
    with pytest.raises(ValueError, match="corruption is 'S2'; it is one of s2, abc"):
        tasks.ioi.__wrapped__(tokenised_as("single"), corruption="S2")
