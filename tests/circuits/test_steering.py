"""Attention rows written over: by brute force, over prompt lengths, and refused when they cannot be."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

import interp
from interp.circuits.steering import row_edits, steer
from interp.metrics import logit_diff
from tests.circuits.choices import joined
from tests.model.families import FAMILIES
from tests.patching.tokens_task import task_of_tokens


@pytest.fixture(scope="module")
def model():
    return interp.load(FAMILIES["llama"].make_model("sdpa"))


def token_task(model, seed):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(model.d_vocab, (3, 6), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 2] = (corrupted[:, 2] + 1) % model.d_vocab
    task = task_of_tokens(clean, corrupted)
    return replace(task, positions={**task.positions, "A": torch.tensor([0, 1, 2]), "B": torch.tensor([3, 1, 4])})


def test_rows_are_what_was_asked_for_and_nothing_else_changes(model):
    task = token_task(model, 0)
    edits = row_edits(model, task, ["L1H0", "L1H2", "L0H1"], ["A", "B"], fractions=[0.7, 0.2])
    _, plain = model.run_with_cache(task.clean, "pattern")
    with model.edited(edits):
        _, cache = model.run_with_cache(task.clean, ["pattern", "z", "v"])
    row = torch.zeros(3, 6)
    for prompt, (first, second) in enumerate([(0, 3), (1, 1), (2, 4)]):
        row[prompt, first] += 0.7
        row[prompt, second] += 0.2
    for layer, head in ((1, 0), (1, 2), (0, 1)):
        torch.testing.assert_close(cache["pattern", layer][:, head, -1], row)
        group = head * model.n_kv_heads // model.n_heads
        torch.testing.assert_close(
            cache["z", layer][:, -1, head], torch.einsum("pk,pkd->pd", row, cache["v", layer][:, :, group])
        )
    untouched = [head for head in range(model.n_heads) if head != 1]
    torch.testing.assert_close(cache["pattern", 0][:, untouched], plain["pattern", 0][:, untouched])
    torch.testing.assert_close(cache["pattern", 0][:, 1, :-1], plain["pattern", 0][:, 1, :-1])


def test_no_place_at_all_is_a_row_of_zeros(model):
    task = token_task(model, 0)
    with model.edited(row_edits(model, task, ["L0H0"], [])):
        _, cache = model.run_with_cache(task.clean, "z")
    assert not cache["z", 0][:, -1, 0].any()


def test_steer_is_the_edited_run_also_over_lengths_and_batches(model):
    short = token_task(model, 0)
    longer = task_of_tokens(
        torch.cat([short.clean, short.clean[:, :2]], 1), torch.cat([short.corrupted, short.clean[:, :2]], 1)
    )
    longer = replace(longer, positions={**longer.positions, "A": torch.tensor([5, 6, 7]), "B": torch.tensor([0, 0, 1])})
    found = steer(model, joined(short, longer), ["L1H0", "L0H1"], ["A", "B"], batch_size=2)
    expected = []
    for task in (short, longer):
        with model.edited(row_edits(model, task, ["L1H0", "L0H1"], ["A", "B"])):
            expected.append(logit_diff(model(task.clean)[:, -1], task.answers, task.wrong))
    expected = torch.stack(expected, 1).flatten().numpy()  # prompts alternate in the joined task
    np.testing.assert_allclose(found["metric"].sel(run="steered"), expected, atol=1e-5)
    plain = logit_diff(model(short.clean)[:, -1], short.answers, short.wrong)
    np.testing.assert_allclose(found["metric"].sel(run="plain")[::2], plain, atol=1e-5)
    assert np.abs(found["metric"].sel(run="steered") - found["metric"].sel(run="plain")).max() > 1e-3
    gained = (found["top1"].sel(run="steered") > found["top1"].sel(run="plain")).sum()
    assert found.attrs["n_repaired"] == int(gained)


def test_row_edits_refuse_before_any_run(model):
    task = token_task(model, 0)
    for heads, onto, fractions, message in (
        (["mlp0"], ["A"], None, "not a head"),
        (["L0H99"], ["A"], None, "out of range"),
        (["L0H0"], ["C"], None, "not a key position"),
        (["L0H0"], ["A", "B"], [1.0], "one for each"),
        (["L0H0"], ["A", "B"], [0.7, 0.7], "at most 1"),
        (["L0H0"], ["A"], [float("nan")], "none negative"),
        (["L0H0"], torch.full((3, 1), 6), None, "prompt 0 are .6.; they run 0..5"),
        (["L0H0"], torch.zeros(3, dtype=torch.long), None, "a row of positions for each of 3"),
        (["L0H0"], torch.zeros(4, 1, dtype=torch.long), None, "a row of positions for each of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            row_edits(model, task, heads, onto, fractions=fractions)
        with no_run(model), pytest.raises(ValueError, match=message):
            steer(model, task, heads, onto, fractions=fractions)


@contextmanager
def no_run(model):
    """A model whose forward pass must not begin."""
    handle = model.hf.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass before the input was checked"))
    try:
        yield
    finally:
        handle.remove()
