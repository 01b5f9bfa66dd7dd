"""Paths against all paths of a small graph, written out."""

from __future__ import annotations

import numpy as np
import pytest

from interp.circuits.circuit import Circuit
from interp.circuits.edge_scores import secant_edge_scores
from interp.circuits.graph import Graph
from interp.circuits.paths import strongest_paths
from tests.circuits.tiny import tiny_model, tiny_task


def flow_of(name):
    model = tiny_model(name)
    scores = secant_edge_scores(model, tiny_task())
    return Circuit.from_scores(Graph.of(model), scores, np.zeros(scores.shape, dtype=bool))


def every_path(circuit):
    """The slow, obvious twin: all ways down from the logits, by recursion."""
    graph, flow = circuit.graph, np.nan_to_num(circuit.scores).astype(np.float64)

    def into(node):
        readers = np.flatnonzero(graph.feeds[:, node])
        parts = [(reader, writer, flow[writer, reader] / graph.feeds[reader].sum())
                 for reader in readers for writer in range(graph.n_upstream[reader])]  # fmt: skip
        total = sum(part for *_, part in parts)
        return [(reader, writer, part / total) for reader, writer, part in parts if part]

    def ways(node):
        if node == 0:
            return [(1.0, ("embed",))]
        name = graph.writers[node]
        return [
            (share * weight, (*path, name + "." + graph.readers[reader][-1] if name[0] == "L" else name))
            for reader, writer, share in into(node)
            for weight, path in ways(writer)
        ]

    last = len(graph.readers) - 1
    return {
        " → ".join((*path, "logits")): weight * flow[writer, last]
        for writer in range(len(graph.writers))
        for weight, path in ways(writer)
        if flow[writer, last]
    }


def test_all_paths_carry_the_whole_flow_and_the_strongest_come_first():
    graph, generator = Graph(2, 4, 2, False), np.random.default_rng(0)
    circuit = Circuit(
        graph,
        np.where(graph.exists, generator.normal(size=graph.exists.shape), np.nan),
        np.zeros(graph.exists.shape, dtype=bool),
    )
    expected = every_path(circuit)
    found = strongest_paths(circuit, n_paths=50)
    by_size = sorted(expected.values(), key=abs, reverse=True)
    np.testing.assert_allclose(found["flow"].abs(), np.abs(by_size[:50]), rtol=1e-9)
    for path, flow in zip(found["path"], found["flow"], strict=True):
        assert flow == pytest.approx(expected[path])
    assert sum(expected.values()) == pytest.approx(np.nansum(circuit.scores[:, -1]))


def test_a_real_flow_has_paths_that_begin_and_end_where_they_should():
    found = strongest_paths(flow_of("llama"), n_paths=5)
    assert len(found) == 5
    assert found["path"].str.startswith("embed → ").all()
    assert found["path"].str.endswith("logits").all()
    assert (found["flow"].abs().diff().dropna() <= 0).all()


def test_bad_choices_are_refused():
    with pytest.raises(ValueError, match="n_paths=0"):
        strongest_paths(flow_of("gpt2"), n_paths=0)
