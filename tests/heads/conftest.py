"""Tiny tasks for tiny models."""

from __future__ import annotations

import pytest
import torch

import interp


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def tiny(request: pytest.FixtureRequest) -> interp.Model:
    """Each tiny model in turn: RMSNorm with grouped key/value heads, LayerNorm with biases."""
    return request.getfixturevalue(request.param)


def make_task(model: interp.Model, n: int = 4) -> interp.tasks.Task:
    """IOI prompts of one length."""
    return interp.tasks.ioi(model, n=n, seed=1, corruption="abc")


def make_mixed_task(model: interp.Model) -> interp.tasks.Task:
    """Prompts of two lengths, out of order."""
    names = [("Mary", "John"), ("Tom", "James"), ("Alice", "Bob")]
    texts = ["{0} and {1} went to the store and {1} gave a book to", "{0} and {1} went and {1} gave a book to"]
    pairs = [
        {
            "clean": texts[row % 2].format(io, s),
            "corrupted": texts[row % 2].format(s, io),
            "answer": f" {io}",
            "wrong": f" {s}",
        }
        for row, (io, s) in enumerate(names)
    ]
    return interp.tasks.from_pairs(model, pairs)


def logit_diff(logits: torch.Tensor, task: interp.tasks.Task, row: int) -> float:
    """Logit of the only answer minus that of the only wrong one, at the last position of one prompt."""
    last = logits[0, -1].double()
    return float(last[task.answers[row, 0]] - last[task.wrong[row, 0]])


@pytest.fixture
def task(tiny: interp.Model) -> interp.tasks.Task:
    return make_task(tiny)


@pytest.fixture
def mixed_task(tiny: interp.Model) -> interp.tasks.Task:
    return make_mixed_task(tiny)
