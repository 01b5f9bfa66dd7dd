"""Batches and divergences of trained circuits against circuit evaluation and finite differences."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import interp
from interp.circuits.evaluate import measured
from interp.circuits.training import CircuitTraining
from tests.model.families import FAMILIES
from tests.patching.linear_model import pairs_of_tokens


def tiny(name="llama"):
    return interp.load(FAMILIES[name].make_model("eager", torch.float64))


def of_two_lengths():
    """5 prompts of 9 tokens, then 7 of 6."""
    long, short = pairs_of_tokens(5, 9, seed=1), pairs_of_tokens(7, 6, seed=2)
    texts = ("clean_ids", "corrupted_ids", "clean_text", "corrupted_text", "str_tokens", "corrupted_str_tokens")
    return replace(
        long,
        **{name: getattr(long, name) + getattr(short, name) for name in texts},
        **{name: torch.cat([getattr(long, name), getattr(short, name)]) for name in ("answers", "wrong")},
        positions={"END": torch.cat([long.positions["END"], short.positions["END"]])},
        index=torch.arange(12),
    )


def test_every_prompt_is_in_one_batch_of_about_the_same_size():
    training = CircuitTraining(tiny(), of_two_lengths(), 4, torch.Generator().manual_seed(0))
    assert sorted(map(len, training.batches)) == [2, 3, 3, 4]
    rows = [row for batch in training.batches for row in batch.index.tolist()]
    assert sorted(rows) == list(range(12))
    assert all(len(set(map(len, batch.clean_ids))) == 1 for batch in training.batches)


def test_every_epoch_has_all_batches_in_an_order_of_its_own():
    training = CircuitTraining(tiny(), of_two_lengths(), 4, torch.Generator().manual_seed(0))
    batches = training.forever()
    epochs = [[training.batches.index(next(batches)) for _ in range(4)] for _ in range(6)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 2


def random_masks(graph, n=3):
    return np.random.default_rng(0).random((n, *graph.exists.shape)) < np.linspace(0.2, 0.8, n)[:, None, None]


@pytest.mark.parametrize("with_constants", [False, True])
def test_divergence_is_that_of_circuit_evaluation(with_constants):
    model, task = tiny("gpt2"), of_two_lengths()
    training = CircuitTraining(model, task, 3, torch.Generator().manual_seed(0))
    masks = random_masks(training.graph)
    constants = torch.randn(len(training.graph.writers), model.d_model) if with_constants else None
    values, _ = measured(model, task, training.graph, list(masks), constants=constants)
    found = torch.empty(3, 12, dtype=torch.float64)
    for batch in training.batches:
        found[:, batch.index] = training.divergence(torch.from_numpy(masks).float(), batch, constants)
    torch.testing.assert_close(found, values["kl"].double(), rtol=1e-4, atol=1e-6)
    assert float(found.min()) > 1e-4


# RMSNorm rounds to float32 inside.
@pytest.mark.parametrize(("name", "tolerance"), [("gpt2", 1e-4), ("falcon", 1e-4), ("llama", 2e-3), ("gemma2", 2e-3)])
def test_gradients_are_slopes(name, tolerance):
    """Of fractional masks, and of constants."""
    model, task = tiny(name), pairs_of_tokens()
    training = CircuitTraining(model, task, None, torch.Generator().manual_seed(0))
    shape = training.graph.exists.shape
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(2, *shape, generator=generator, dtype=torch.float64).requires_grad_()
    constants = torch.randn(shape[0], model.d_model, generator=generator, dtype=torch.float64).requires_grad_()

    def loss(mask, constants):
        return training.divergence(mask, training.batches[0], constants).sum()

    gradients = torch.autograd.grad(loss(mask, constants), [mask, constants])
    steps = [torch.randn(one.shape, generator=generator, dtype=torch.float64) * 3e-4 for one in (mask, constants)]
    steps[0] *= torch.from_numpy(training.graph.exists)
    with torch.no_grad():
        for place, (step, gradient) in enumerate(zip(steps, gradients, strict=True)):
            ahead, behind = ([mask, constants] for _ in range(2))
            ahead[place], behind[place] = ahead[place] + step, behind[place] - step
            slope = (loss(*ahead) - loss(*behind)) / 2
            assert float((gradient * step).sum()) == pytest.approx(float(slope), rel=tolerance)
            assert abs(float(slope)) > 1e-6


def test_what_is_not_finite_is_refused():
    model = tiny()
    training = CircuitTraining(model, pairs_of_tokens(), None, torch.Generator())
    constants = torch.full((len(training.graph.writers), model.d_model), torch.nan)
    with pytest.raises(FloatingPointError, match="divergence of a circuit is NaN or infinite"):
        training.divergence(torch.zeros(1, *training.graph.exists.shape), training.batches[0], constants)


def test_by_default_as_many_prompts_as_fit(monkeypatch):
    model = tiny()

    def sizes(task):
        return [len(batch) for batch in CircuitTraining(model, task, None, torch.Generator()).batches]

    assert sizes(pairs_of_tokens(16)) == [8, 8]
    a_prompt = 3 * 16 * 7 * 32 * 4  # layers, writers, tokens, d_model, bytes
    monkeypatch.setattr("interp.circuits.training.STEP_BYTES", 5 * a_prompt)
    assert sizes(pairs_of_tokens(10)) == [5, 5]
    monkeypatch.setattr("interp.circuits.training.STEP_BYTES", a_prompt // 2)
    assert sizes(pairs_of_tokens(3)) == [1, 1, 1]
    with pytest.raises(ValueError, match="batch_size=0; it is at least 1, or None"):
        CircuitTraining(model, pairs_of_tokens(), 0, torch.Generator())
