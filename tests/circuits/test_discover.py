"""What every discovery method must do, and what `discover` adds to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp.circuits import METHODS, discover
from interp.circuits.graph import Graph
from tests.circuits.tiny import tiny_model, tiny_task

TASK = tiny_task(n=4)
FAST = [name for name in METHODS if name not in ("edge-pruning", "subnetwork-probing")]


def state_of(model):
    return {
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.hf.modules()],
        "forward": [name for name, module in model.hf.named_modules() if "forward" in vars(module)],
        "attention": model.hf.config._attn_implementation,
        "grad": [parameter.requires_grad for parameter in model.hf.parameters()],
        "training": model.hf.training,
        "sum": float(sum(parameter.detach().double().sum() for parameter in model.hf.parameters())),
    }


@pytest.mark.parametrize("method", FAST)
def test_every_method_finds_the_same_circuit_twice_and_leaves_the_model_as_it_was(method):
    model = tiny_model("llama", torch.float32)
    before = state_of(model)
    first = discover(model, TASK, method)
    assert state_of(model) == before
    again = discover(model, TASK, method)
    assert (first.mask == again.mask).all()
    np.testing.assert_array_equal(first.scores, again.scores)
    assert first.graph == Graph.of(model)
    assert np.isnan(first.scores[..., ~first.graph.exists]).all()
    assert first.attrs["method"] == method
    assert {"model", "task", "seconds", "interp"} <= set(first.attrs)
    assert METHODS[method].summary
    assert METHODS[method].cost


def test_a_method_of_edges_keeps_as_many_as_asked_for():
    model = tiny_model("llama")
    assert discover(model, TASK, "eap", edges=30, prune=False).n_edges == 30
    assert discover(model, TASK, "eap").attrs["n_selected"] == Graph.of(model).n_edges // 10
    whole = discover(model, TASK, "secant", threshold=0.0, prune=False)
    assert whole.n_edges == whole.graph.n_edges


def test_a_method_of_nodes_keeps_all_edges_between_them():
    model = tiny_model("llama")
    circuit = discover(model, TASK, "node-exact", nodes=5)
    heads_and_mlps = [name for name in circuit.nodes if name != "embed"]
    assert len(heads_and_mlps) <= 5
    assert ("embed", "logits") in circuit.edges
    inside = circuit.mask[:, -1]
    assert {circuit.graph.writers[index] for index in np.flatnonzero(inside)} == {"embed", *heads_and_mlps}


def test_bad_choices_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"'eapig' is not a discovery method; did you mean 'eap-ig'"):
        discover(model, TASK, "eapig")
    with pytest.raises(ValueError, match="give one of edges, threshold"):
        discover(model, TASK, "eap", edges=3, threshold=0.1)
    with pytest.raises(ValueError, match="nodes= is for methods that score nodes"):
        discover(model, TASK, "eap", nodes=3)
    with pytest.raises(ValueError, match="chooses edges by threshold="):
        discover(model, TASK, "acdc", edges=3)
    with pytest.raises(ValueError, match="threshold=0"):
        discover(model, TASK, "acdc", threshold=0)
    with pytest.raises(ValueError, match=r"nodes=100 is outside 1\.\."):
        discover(model, TASK, "node-atp", nodes=100)
