from __future__ import annotations

import json
import random
import sys

import pytest
import torch
from safetensors import safe_open

from interp import zoo
from interp.zoo.trained import NAMES, draw_ioi, is_held_out, with_weights
from interp.zoo.training import train_induction, train_ioi


def test_pairs_of_names_are_held_out_in_both_orders_and_every_name_is_trained():
    tokens = range(1, 1 + len(NAMES))
    pairs = [(one, other) for one in tokens for other in tokens if one != other]
    assert all(is_held_out(*pair) == is_held_out(*reversed(pair)) for pair in pairs)
    assert 0.15 < sum(is_held_out(*pair) for pair in pairs) / len(pairs) < 0.25
    rng = random.Random(0)
    for held_out in (True, False):
        drawn = [draw_ioi(rng, number, held_out=held_out) for number in range(200)]
        assert {is_held_out(prompt.answer, prompt.wrong) for prompt in drawn} == {held_out}
        assert {prompt.answer for prompt in drawn} == set(tokens)


def test_the_measured_accuracies_are_those_of_the_weights_that_ship():
    assert train_induction.induction_accuracy(zoo.load("induction_2l").hf, seed=5) > 0.9
    assert train_ioi.ioi_accuracy(zoo.load("ioi_small").hf, seed=5) > 0.95


@pytest.mark.parametrize("distinct", [True, False])
def test_a_repeated_batch_is_a_prefix_and_a_sequence_twice(distinct):
    generator = torch.Generator().manual_seed(0)
    tokens = train_induction.repeated_batch(generator, prefix=2, length=30, distinct=distinct, batch=3)
    assert tokens.shape == (3, 63)
    assert (tokens[:, 0] == 0).all()
    assert tokens[:, 1:].min() > 0
    assert torch.equal(tokens[:, 3:33], tokens[:, 33:])
    assert all((len(set(row)) == 33) == distinct for row in tokens.tolist())


def test_what_is_predicted_starts_at_the_second_token_of_the_repetition():
    class Echo:
        def __call__(self, tokens):
            self.logits = torch.nn.functional.one_hot(tokens, 63).float()
            return self

    tokens = train_induction.repeated_batch(torch.Generator().manual_seed(0), prefix=1, length=9, batch=3)
    logits, right = train_induction.in_repetition(Echo(), tokens, length=9)
    assert torch.equal(logits.argmax(dim=-1), tokens[:, 11:-1].flatten())
    assert torch.equal(right, tokens[:, 12:].flatten())


def test_the_trained_induction_model_has_induction_heads():
    model, task = zoo.load("induction_2l"), zoo.task("induction_2l", n=32)
    _, seen = model.run_with_cache(task.clean, "pattern")
    rows = torch.arange(len(task))
    previous = seen["pattern", 0].diagonal(offset=-1, dim1=2, dim2=3).mean(dim=(0, 2))
    follows = seen["pattern", 1][rows, :, task.positions["END"], task.positions["B"]].mean(dim=0)
    assert previous.max() > 0.5
    assert follows.max() > 0.5


@pytest.mark.parametrize(("script", "name"), [(train_induction, "induction_2l"), (train_ioi, "ioi_small")])
def test_training_reproduces_and_writes_what_load_reads(script, name, tmp_path, monkeypatch):
    files = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    for file in files:
        monkeypatch.setattr(sys, "argv", ["train", "--out", str(file), "--steps", "3"])
        script.main()
    assert files[0].read_bytes() == files[1].read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {file.name for file in files}
    with safe_open(files[0], "pt") as file:
        assert json.loads(file.metadata()["training"])["steps"] == 3
        trained = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, safetensors has no iterator
    shipped = zoo.load(name).hf.state_dict()
    assert {key: tensor.shape for key, tensor in trained.items()} == {
        key: tensor.shape for key, tensor in shipped.items()
    }


def test_missing_weights_are_named():
    with pytest.raises(FileNotFoundError, match="the weights of 'gone' are missing"):
        with_weights(None, "gone")
