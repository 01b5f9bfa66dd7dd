"""Optimal constants against mean and zero ablation, and where the best constant is known."""

import numpy as np
import pytest
import torch

import interp
from interp.circuits.evaluate import mean_outputs, run_circuits
from interp.circuits.graph import Graph
from interp.circuits.optimal_ablation import optimal_constants
from interp.circuits.writers import HeadOutputs
from interp.metrics import kl_divergence
from tests.model.families import FAMILIES
from tests.patching.linear_model import pairs_of_tokens


def tiny(name="gpt2"):
    return interp.load(FAMILIES[name].make_model("sdpa", torch.float32))


def means(model, task):
    return mean_outputs(model, task.by_length(), Graph.of(model), HeadOutputs(model))


def losses(model, task, masks, **ablation):
    """Mean KL of circuits' predictions from the model's."""
    full = {tuple(ids): row for ids, row in zip(task.clean_ids, model(task.clean)[:, -1], strict=True)}

    def kl(logits, prompts):
        return kl_divergence(torch.stack([full[ids] for ids in prompts.clean_ids]), logits)

    return run_circuits(model, task, Graph.of(model), masks, {"kl": kl}, **ablation)["kl"].mean(1)


def without(graph, *names):
    """All edges but those that leave these writers."""
    mask = graph.exists.copy()
    mask[[graph.writer_index[name] for name in names]] = False
    return mask


def test_constants_for_a_circuit_do_less_harm_than_mean_and_zero():
    model, task = tiny(), pairs_of_tokens(16)
    graph = Graph.of(model)
    masks = (np.random.default_rng(0).random((1, *graph.exists.shape)) < 0.5) & graph.exists
    constants = optimal_constants(model, task, masks=masks, steps=150, learning_rate=5e-3)
    assert constants.shape == (len(graph.writers), model.d_model)
    assert not constants.requires_grad
    optimal, mean, zero = (
        float(losses(model, task, masks, **how))
        for how in ({"constants": constants}, {"ablation": "mean"}, {"ablation": "zero"})
    )
    assert optimal < 0.7 * mean
    assert mean < zero


def test_constants_for_no_circuit_in_particular_serve_others_and_other_prompts():
    model, task = tiny(), pairs_of_tokens(16)
    graph = Graph.of(model)
    draws = np.random.default_rng(5).random((9, *graph.exists.shape))
    masks = (draws < np.linspace(0.1, 0.9, 9)[:, None, None]) & graph.exists
    constants = optimal_constants(model, task, steps=150, learning_rate=5e-3)
    optimal, mean = (
        losses(model, task, masks, **how).mean() for how in ({"constants": constants}, {"ablation": "mean"})
    )
    assert float(optimal) < 0.8 * float(mean)


def test_the_best_constant_of_a_linear_readout_is_found():
    """A head in the last layer, read by the logits alone, on one prompt: its own output loses nothing."""
    model, task = tiny(), pairs_of_tokens(1)
    masks = without(Graph.of(model), "mlp2")[None]
    start = float(losses(model, task, masks, constants=means(model, task)))
    constants = optimal_constants(model, task, masks=masks, steps=150, learning_rate=0.05)
    assert start > 1e-3
    assert float(losses(model, task, masks, constants=constants)) < 1e-2 * start


def test_a_component_with_a_constant_output_costs_nothing():
    """A head whose values are its bias: the mean is its output at every position, and stays the best."""
    model, task = tiny(), pairs_of_tokens(6)
    with torch.no_grad():
        attn = model.hf.transformer.h[1].attn
        attn.c_attn.weight[:, 64 + 8 : 64 + 16] = 0  # W_V of head 1, which has 8 dimensions
        attn.c_attn.bias[64 + 8 : 64 + 16] = 1.0
    masks = without(Graph.of(model), "L1H1")[None]
    assert float(losses(model, task, masks, ablation="zero")) > 1e-4
    constants = optimal_constants(model, task, masks=masks, steps=30)
    assert float(losses(model, task, masks, constants=constants)) < 1e-5


def test_writers_that_are_never_cut_keep_their_mean():
    model, task = tiny("llama"), pairs_of_tokens(6)
    graph = Graph.of(model)
    masks = np.stack([without(graph, "L0H1"), without(graph, "mlp1", "L2H0")])
    moved = (optimal_constants(model, task, masks=masks, steps=20) - means(model, task)).abs().amax(1)
    cut = [graph.writer_index[name] for name in ("L0H1", "mlp1", "L2H0")]
    assert float(moved[cut].min()) > 1e-3
    moved[cut] = 0
    assert float(moved.max()) == 0


def test_circuits_with_positions():
    """The only edge cut is at the last position, where the logits read: as if cut at all positions."""
    model, task = tiny(), pairs_of_tokens(4)
    graph = Graph.of(model)
    everywhere = graph.exists.copy()
    everywhere[graph.edge("mlp2", "logits")] = False
    at_last = np.broadcast_to(graph.exists, (7, *graph.exists.shape)).copy()
    at_last[-1] = everywhere
    one, other = (optimal_constants(model, task, masks=masks[None], steps=20) for masks in (everywhere, at_last))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_seeds_and_a_model_left_as_found():
    model, task = tiny("llama"), pairs_of_tokens(5)
    state = torch.random.get_rng_state()
    with torch.no_grad():
        one, again, other = (optimal_constants(model, task, steps=4, seed=seed, batch_size=2) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in model.hf.parameters())


def test_bad_input_is_refused_before_any_run(monkeypatch):
    model, task = tiny(), pairs_of_tokens()
    exists = Graph.of(model).exists
    monkeypatch.setattr(model, "_forward", None)
    for choices, message in [
        ({"steps": 0}, "steps=0; it is greater than 0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0; it is greater than 0"),
        ({"masks": exists}, r"masks have the shape \(16, 40\); this graph's are \[circuit, \.\.\., \(16, 40\)\]"),
        ({"masks": np.stack([[exists] * 5])}, "masks are for prompts of 5 tokens; this task has prompts of 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimal_constants(model, task, **choices)
