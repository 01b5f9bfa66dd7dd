"""Circuits as values and as files."""

from __future__ import annotations

import json

import networkx as nx
import numpy as np
import pytest

from interp.circuits.circuit import Circuit
from interp.circuits.graph import Graph
from interp.circuits.storage import load, save, to_dot, to_graphml, to_networkx

GRAPH = Graph(3, 4, 2, False)


@pytest.fixture
def circuit():
    draws = np.random.default_rng(0).normal(size=GRAPH.exists.shape).astype(np.float32)
    scores = np.where(GRAPH.exists, draws, np.nan)
    blank = Circuit(GRAPH, scores, np.zeros(scores.shape, dtype=bool), {"model": "tiny", "method": "eap", "steps": 5})
    return blank.select(edges=40)


def test_what_is_in_it(circuit):
    assert circuit.n_edges == len(circuit.edges) == circuit.mask.sum()
    assert circuit.attrs["n_selected"] == 40
    assert circuit.attrs["n_pruned"] == 40 - circuit.n_edges
    writers = {writer for writer, _ in circuit.edges}
    assert writers <= set(circuit.nodes)
    assert set(circuit.heads) == {name for name in circuit.nodes if name.startswith("L")}
    writer, reader = circuit.edges[0]
    assert circuit.score_of(writer, reader) == circuit.to_array()["score"].sel(writer=writer, reader=reader)
    with pytest.raises(ValueError, match="read-only"):
        circuit.mask[0, 0] = True


@pytest.mark.parametrize("positions", [False, True])
def test_a_file_gives_the_circuit_back(circuit, positions, tmp_path):
    if positions:
        scores, mask = (np.stack([one, one]) for one in (circuit.scores, circuit.mask))
        circuit = Circuit(GRAPH, scores, mask, circuit.attrs)
    path = save(circuit, tmp_path / "circuit.json")
    again = load(path)
    assert again.graph == circuit.graph
    assert dict(again.attrs) == dict(circuit.attrs)
    assert (again.mask == circuit.mask).all()
    np.testing.assert_array_equal(again.scores, circuit.scores)
    assert save(again, tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["again.json", "circuit.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format is not"),
        ({"version": 2}, "version 2"),
        ({"graph": {"n_layers": 3, "n_heads": 4, "n_kv_heads": 3, "parallel": False}}, "do not share"),
        ({"shape": [3, 3]}, "does not fit the graph"),
        ({"kept": [10**9]}, "kept: entries are whole numbers"),
        ({"kept": [0, 0]}, "stands twice"),
        ({"scores": [1.0]}, "not one finite number"),
        ({"edges": []}, "the names do not say"),
        ({"attrs": None}, "not a circuit file"),
    ],
)
def test_damaged_files_are_refused(circuit, change, message, tmp_path):
    path = save(circuit, tmp_path / "circuit.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"circuit.json.*{message}"):
        load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "interp.circuit", "version": 1}'])
def test_torn_files_are_refused(text, tmp_path):
    path = tmp_path / "torn.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"torn.json: not a circuit file"):
        load(path)


def test_other_programs_get_the_same_graph(circuit, tmp_path):
    graph = to_networkx(circuit)
    assert set(graph.nodes) == {*circuit.nodes, "logits"}
    queries = [(writer, reader.partition(".")[0]) for writer, reader in circuit.edges if reader.endswith(".q")]
    drawn = [(writer, target) for writer, target, edge in graph.edges(data=True) if edge["reader"] == "q"]
    assert sorted(queries) == sorted(drawn)
    again = nx.read_graphml(to_graphml(circuit, tmp_path / "circuit.graphml"))
    assert nx.utils.graphs_equal(nx.MultiDiGraph(again.edges()), nx.MultiDiGraph(graph.edges()))
    dot = to_dot(circuit)
    assert dot.count("->") == graph.number_of_edges()
    assert dot.startswith("digraph")
    assert dot.endswith("}\n")


def test_what_does_not_fit_is_refused(circuit):
    with pytest.raises(ValueError, match="mask has the shape"):
        Circuit(GRAPH, circuit.scores.copy(), np.zeros((2, 2), dtype=bool))
    wrong = ~GRAPH.exists
    with pytest.raises(ValueError, match="keeps what is no edge"):
        Circuit(GRAPH, circuit.scores.copy(), wrong)
