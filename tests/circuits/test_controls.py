"""Controls against circuits that are run by hand."""

from __future__ import annotations

import numpy as np
import pytest

from interp.circuits.circuit import Circuit
from interp.circuits.controls import completeness, minimality, random_control, without_nodes
from interp.circuits.edge_scores import secant_edge_scores
from interp.circuits.evaluate import measured
from interp.circuits.graph import Graph
from interp.circuits.node_scores import node_array
from interp.circuits.roc import edge_roc, graph_of_nodes, node_roc
from tests.circuits.tiny import tiny_model, tiny_task

TASK = tiny_task(n=3)


@pytest.fixture(scope="module")
def found():
    model = tiny_model("llama")
    scores = secant_edge_scores(model, TASK)
    blank = Circuit.from_scores(Graph.of(model), scores, np.zeros(scores.shape, dtype=bool))
    return model, blank.select(edges=120)


def faithfulness(model, graph, mask):
    return float(measured(model, TASK, graph, [mask])[0]["faithfulness"].mean())


def test_random_circuits_have_its_size_and_the_p_value_counts_them(found):
    model, circuit = found
    control = random_control(model, TASK, circuit, n_random=9, seed=1)
    own, others = float(control["faithfulness"]), control["random"].values
    assert own == pytest.approx(faithfulness(model, circuit.graph, circuit.mask), abs=1e-9)
    assert control.attrs["p_value"] == (1 + (abs(1 - others) <= abs(1 - own)).sum()) / 10
    assert len(set(others.round(6))) > 5
    again = random_control(model, TASK, circuit, n_random=9, seed=1)
    assert (again["random"].values == others).all()
    whole = Circuit(circuit.graph, circuit.scores.copy(), circuit.graph.exists.copy())
    assert random_control(model, TASK, whole, n_random=3).attrs["p_value"] == 1  # there is only one of that size


def test_sets_are_knocked_out_of_both(found):
    model, circuit = found
    result = completeness(model, TASK, circuit, n_subsets=4, seed=2)
    generator = np.random.default_rng(2)
    nodes = np.array([name for name in circuit.nodes if name != "embed"])
    for row in range(4):
        chosen = nodes[generator.random(len(nodes)) < 0.5]
        for name, mask in (("circuit", circuit.mask), ("model", circuit.graph.exists)):
            expected = faithfulness(model, circuit.graph, without_nodes(circuit.graph, mask, chosen))
            assert float(result[name][row]) == pytest.approx(expected, abs=1e-9)
        assert int(result["n_nodes"][row]) == len(chosen)
    everything = Circuit(circuit.graph, circuit.scores.copy(), circuit.graph.exists.copy())
    assert completeness(model, TASK, everything, n_subsets=3).attrs["incompleteness"] == 0


def test_minimality_is_what_each_node_adds(found):
    model, circuit = found
    result = minimality(model, TASK, circuit)
    own = faithfulness(model, circuit.graph, circuit.mask)
    for name in result["node"].values[::4]:
        without = faithfulness(model, circuit.graph, without_nodes(circuit.graph, circuit.mask, [name]))
        assert float(result.sel(node=name)) == pytest.approx(own - without, abs=1e-9)


def test_controls_refuse_before_any_run(found, monkeypatch):
    model, circuit = found
    monkeypatch.setattr(model, "_forward", None)
    for control, choices, message in (
        (random_control, {"n_random": 0}, "n_random=0; it is at least 1"),
        (completeness, {"n_subsets": 0}, "n_subsets=0; it is at least 1"),
        (completeness, {"share": 1.5}, "share=1.5; it is the chance of a node"),
    ):
        with pytest.raises(ValueError, match=message):
            control(model, TASK, circuit, **choices)
    for control in (random_control, completeness, minimality):
        with pytest.raises(ValueError, match="the circuit has no edges"):
            control(model, TASK, circuit.select(edges=0))


def test_roc_by_hand():
    graph = Graph(1, 2, 2, False)
    pairs = [("embed", "L0H0.v"), ("L0H0", "logits"), ("embed", "mlp0")]
    scores = np.where(graph.exists, 0.0, np.nan)
    for value, pair in zip((3.0, -2.0, 1.0), pairs, strict=True):
        scores[graph.edge(*pair)] = value
    circuit = Circuit(graph, scores, np.zeros(scores.shape, dtype=bool)).select(edges=2, prune=False)
    known = edge_roc(circuit, pairs[:2])
    assert known["auroc"] == known["average_precision"] == known["precision"] == known["recall"] == 1
    wrong = edge_roc(circuit, [pairs[0], pairs[2]])
    n_others = graph.n_edges - 2
    assert wrong["auroc"] == pytest.approx((n_others + n_others - 1) / (2 * n_others))
    assert wrong["precision"] == wrong["recall"] == 0.5
    signed = edge_roc(circuit, pairs[:2], signed=True)
    assert signed["auroc"] == pytest.approx(n_others / (2 * n_others))
    unscored = circuit.scores.copy()
    unscored[graph.edge(*pairs[0])] = np.nan  # ranks last, also behind edges of score 0
    assert edge_roc(Circuit(graph, unscored, circuit.mask.copy()), pairs[:1])["auroc"] == 0
    with pytest.raises(ValueError, match="no edge"):
        edge_roc(circuit, [("mlp0", "L0H0.q")])
    with pytest.raises(ValueError, match="all or none"):
        edge_roc(circuit, [])


def test_node_roc_by_hand():
    scores = node_array(["embed", "L0H0", "L0H1", "mlp0"], {"L0H0": -3.0, "L0H1": 1.0, "mlp0": 2.0, "embed": 9.0}, {})
    assert node_roc(scores, ["L0H0", "mlp0"])["auroc"] == 1
    assert node_roc(scores, ["L0H1"], nodes=["L0H0", "L0H1"])["auroc"] == 0
    assert node_roc(scores, ["L0H0", "L0H1"])["precision"] == 0.5
    with pytest.raises(ValueError, match="'L9H9' is not a node"):
        node_roc(scores, ["L9H9"])
    with pytest.raises(ValueError, match="'L9H9' is not a node"):
        node_roc(scores, ["L0H0"], nodes=["L0H0", "L9H9"])


def test_the_graph_of_nodes_has_the_edges_between_them():
    graph = Graph(2, 4, 2, False)
    edges = graph_of_nodes(graph, ["L0H1", "L1H2"])
    inside = {("embed", "L0H1.q"), ("L0H1", "L1H2.q"), ("L0H1", "L1H1.k"), ("L1H2", "logits"), ("embed", "logits")}
    assert inside <= edges
    assert not [one for one in edges if "mlp" in one[0] + one[1]]
    assert len(edges) == 3 + 6 + 3
