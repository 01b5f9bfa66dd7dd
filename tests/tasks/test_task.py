"""A task's checks, parts and lengths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from interp.tasks import Task

ROWS = ((5, 6, 7), (5, 8, 9, 7), (5, 6, 9))
CORRUPTED = ((5, 8, 7), (5, 8, 6, 7), (5, 6, 7))


def words(rows: tuple[tuple[int, ...], ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(f"t{token}" for token in row) for row in rows)


def texts(rows: tuple[tuple[int, ...], ...]) -> tuple[str, ...]:
    return tuple(" ".join(row) for row in words(rows))


def a_task() -> Task:
    return Task(
        name="toy",
        clean_ids=ROWS,
        corrupted_ids=CORRUPTED,
        answers=torch.tensor([[1, 2], [3, -1], [4, -1]]),
        wrong=torch.tensor([[3], [1], [1]]),
        positions={"MID": torch.tensor([1, 2, 1]), "END": torch.tensor([2, 3, 2])},
        metric="logit_diff",
        clean_text=texts(ROWS),
        corrupted_text=texts(CORRUPTED),
        str_tokens=words(ROWS),
        corrupted_str_tokens=words(CORRUPTED),
        index=torch.arange(3),
    )


def test_by_length_keeps_order_and_remembers_rows():
    short, long = a_task().by_length()
    assert short.clean.tolist() == [[5, 6, 7], [5, 6, 9]]
    assert long.corrupted.tolist() == [[5, 8, 6, 7]]
    assert short.index.tolist() == [0, 2]
    assert long.index.tolist() == [1]
    assert short.answers.tolist() == [[1, 2], [4, -1]]
    assert short.positions["MID"].tolist() == [1, 1]


def test_by_length_of_a_part_counts_rows_of_that_part():
    assert [part.index.tolist() for part in a_task()[[2, 1]].by_length()] == [[0], [1]]


def test_several_lengths_have_no_tensor():
    with pytest.raises(ValueError, match=r"several lengths \(2 of 3 tokens, 1 of 4 tokens\); use task.by_length\(\)"):
        _ = a_task().clean


def test_indexing():
    task = a_task()
    assert len(task[1:]) == 2
    assert task[[2, 0]].index.tolist() == [2, 0]
    assert task[-1].clean_text == ("t5 t6 t9",)
    assert [one.index.item() for one in task] == [0, 1, 2]
    with pytest.raises(IndexError):
        task[3]


def test_first_difference_and_labels():
    assert a_task().first_difference.tolist() == [1, 2, 2]
    assert a_task()[[0, 2]].position_labels == ("t5", "t6", "END")
    assert a_task()[[0]].position_labels == ("t5", "t6", "t7")


def test_repr():
    assert repr(a_task()) == "Task(toy: 3 prompt pairs of 3 to 4 tokens, logit_diff)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"corrupted_ids": ((5, 8), *CORRUPTED[1:])},
            r"pair 0: clean is 3 tokens and corrupted 2.*position 1: clean",
        ),
        ({"corrupted_ids": (CORRUPTED[0], ROWS[1], CORRUPTED[2])}, "pair 1: clean and corrupted are the same tokens"),
        ({"answers": torch.tensor([[1], [-1], [4]])}, "pair 1: no answer"),
        ({"wrong": torch.tensor([[3], [1], [4]])}, "pair 2: token 4 is both a right and a wrong answer"),
        ({"positions": {"MID": torch.tensor([1, 4, 1])}}, r"pair 1: position 'MID' is 4; positions run 0\.\.3"),
        ({"metric": "logitdiff"}, "did you mean 'logit_diff'"),
        ({"clean_text": ("a",)}, "parts of different length"),
    ],
)
def test_bad_parts(change: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        replace(a_task(), **change)


def test_no_prompts():
    with pytest.raises(ValueError, match="'toy' has no prompts"):
        a_task()[[]]
