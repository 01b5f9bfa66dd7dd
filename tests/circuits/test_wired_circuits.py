"""Methods against circuits that are known for certain: those of the hand-wired models."""

from __future__ import annotations

import numpy as np
import pytest

from interp import zoo
from interp.circuits import discover, edge_roc, evaluate, node_roc
from interp.circuits.node_scores import exact_node_scores

WIRED = ("induction", "duplicate", "llama_induction")
EDGE_METHODS = ("eap", "eap-ig", "eap-ig-activations", "eap-clean-corrupted", "relp", "secant", "exact", "edge-pruning")


@pytest.fixture(scope="module", params=WIRED)
def known(request):
    name = request.param
    return zoo.load(name), zoo.task(name, n=8), zoo.edges(name)


@pytest.mark.parametrize("method", EDGE_METHODS)
def test_known_edges_come_before_all_others(known, method):
    model, task, edges = known
    found = edge_roc(discover(model, task, method), edges)
    assert found["auroc"] == 1
    assert found["average_precision"] == pytest.approx(1)


def test_acdc_keeps_the_known_edges_and_no_other(known):
    model, task, edges = known
    assert frozenset(discover(model, task, "acdc", threshold=0.01).edges) == edges


def test_the_known_circuit_alone_does_the_task(known):
    model, task, edges = known
    circuit = discover(model, task, "exact", edges=len(edges), prune=False)
    assert frozenset(circuit.edges) == edges
    curve = evaluate(model, task, circuit, sizes=(0, 1))
    assert float(curve["circuit_faithfulness"]) == pytest.approx(1, abs=0.05)
    assert float(curve["circuit_accuracy"]) == 1


def test_exact_effects_find_the_known_nodes(known):
    model, task, edges = known
    nodes = {writer for writer, _ in edges} - {"embed"}
    nodes |= {reader.partition(".")[0] for _, reader in edges if reader.endswith(".q")}
    assert node_roc(exact_node_scores(model, task), nodes)["auroc"] == 1


def test_random_scores_find_nothing():
    model, task, edges = zoo.load("duplicate"), zoo.task("duplicate", n=4), zoo.edges("duplicate")
    found = [edge_roc(discover(model, task, "random", seed=seed), edges)["auroc"] for seed in range(30)]
    assert 0.4 < np.mean(found) < 0.6
