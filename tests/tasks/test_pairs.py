"""A user's own pairs: what is taken, and what is said about what is not."""

from __future__ import annotations

import pytest

import interp
from interp import tasks

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
PAIR = {"clean": CLEAN, "corrupted": CORRUPTED, "answer": " Mary", "wrong": " John"}


def test_tokens_answers_and_positions(tiny_llama: interp.Model):
    task = tasks.from_pairs(tiny_llama, [PAIR], name="mine")
    assert task.clean.tolist() == tiny_llama.to_tokens(CLEAN).tolist()
    assert task.answers.tolist() == [[tiny_llama.to_single_token(" Mary")]]
    assert task.wrong.tolist() == [[tiny_llama.to_single_token(" John")]]
    assert task.str_tokens[0][int(task.first_difference[0])] == " John"
    assert task.positions["END"].tolist() == [task.clean.shape[1] - 1]
    assert task.name == "mine"


def test_several_answers_are_padded(tiny_llama: interp.Model):
    task = tasks.from_pairs(tiny_llama, [PAIR, PAIR | {"answer": [" Mary", " Anna"]}])
    assert task.answers.shape == (2, 2)
    assert task.answers[0, 1] == -1


def test_different_lengths_name_the_pair_both_tokens_and_the_first_difference(tiny_llama: interp.Model):
    longer = PAIR | {"corrupted": CORRUPTED.replace("Mary gave", "Mary then gave")}
    with pytest.raises(ValueError, match=r"^pair 1: clean is 14 tokens and corrupted 15; .* position 9: clean \['Wh"):
        tasks.from_pairs(tiny_llama, [PAIR, longer])


def test_no_difference(tiny_llama: interp.Model):
    with pytest.raises(ValueError, match="pair 0: clean and corrupted are the same tokens"):
        tasks.from_pairs(tiny_llama, [PAIR | {"corrupted": CLEAN}])


def test_a_several_token_answer_is_shown_and_first_token_is_offered(tiny_llama: interp.Model):
    pair = PAIR | {"answer": " Mary Anna"}
    with pytest.raises(ValueError, match=r"the answer ' Mary Anna' is 2 tokens, \[' Mary', ' Anna'\].*first_token"):
        tasks.from_pairs(tiny_llama, [pair])
    task = tasks.from_pairs(tiny_llama, [pair], first_token=True)
    assert task.answers.tolist() == [[tiny_llama.to_single_token(" Mary")]]


def test_first_tokens_that_collide(tiny_llama: interp.Model):
    with pytest.raises(ValueError, match="' Mary Anna' begins with the same token as a wrong one"):
        tasks.from_pairs(tiny_llama, [PAIR | {"answer": " Mary Anna", "wrong": " Mary Tom"}], first_token=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": ""}, "field 'answer' is missing or empty"),
        ({"wrong": None}, "field 'wrong' is missing; the logit difference needs it"),
        ({"wrongs": " John"}, "field 'wrongs' is unknown; fields are clean, corrupted, answer, wrong"),
        ({"answer": 7}, "field 'answer' is 7; it must be text"),
        ({"clean": [CLEAN]}, "field 'clean' must be one text"),
    ],
)
def test_bad_fields(change: dict[str, object], message: str, tiny_llama: interp.Model):
    with pytest.raises(ValueError, match=f"pair 0: {message}"):
        tasks.from_pairs(tiny_llama, [PAIR | change])


def test_log_prob_needs_no_wrong_answer(tiny_llama: interp.Model):
    pair = {name: PAIR[name] for name in ("clean", "corrupted", "answer")}
    task = tasks.from_pairs(tiny_llama, [pair], metric="log_prob")
    assert task.wrong.shape == (1, 0)
    assert tasks.accuracy(tiny_llama, task)["metric"].sel(statistic="mean").notnull().all()


def test_no_pairs(tiny_llama: interp.Model):
    with pytest.raises(ValueError, match="'pairs' has no prompts"):
        tasks.from_pairs(tiny_llama, [])
