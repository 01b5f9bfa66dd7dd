"""The graph: counts against published ones, names, edges, and which node a reader is an input of."""

from __future__ import annotations

import time

import numpy as np
import pytest

from interp.circuits.graph import Graph
from interp.patching.edges import Reader, Writer, is_upstream
from tests.circuits.tiny import tiny_model


@pytest.mark.parametrize(
    ("sizes", "n_edges"),
    [
        ((12, 12, 12, False), 32_491),  # GPT-2 small
        ((24, 16, 16, False), 231_877),  # GPT-2 medium
        ((6, 8, 8, True), 3_580),  # Pythia-70M
        ((24, 16, 16, True), 231_493),  # Pythia-410M
        ((30, 9, 3, False), 70_651),  # SmolLM2-135M, by key/value head
    ],
)
def test_edge_counts_are_the_published_ones(sizes, n_edges):
    graph = Graph(*sizes)
    assert graph.n_edges == graph.exists.sum() == n_edges


def test_a_graph_of_a_large_model_is_made_at_once():
    started = time.perf_counter()
    graph = Graph(32, 32, 32, False)
    assert graph.n_edges == 1_592_881  # Llama-3.1-8B, keys and values by query head
    assert graph.feeds.shape == (len(graph.readers), len(graph.writers))
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_edges_are_what_path_patching_calls_edges(name):
    model = tiny_model(name)
    graph = Graph.of(model)
    for writer, one in zip(graph.writers, graph.exists, strict=True):
        for reader, exists in zip(graph.readers, one, strict=True):
            upstream = is_upstream(Writer.parse(writer), Reader.parse(reader, model), parallel=graph.parallel)
            assert exists == upstream, (writer, reader)


def test_readers_feed_their_nodes():
    graph = Graph(2, 4, 2, False)
    fed = {
        reader: [graph.writers[index] for index in np.flatnonzero(row)]
        for reader, row in zip(graph.readers, graph.feeds, strict=True)
    }
    assert fed["L1H3.q"] == ["L1H3"]
    assert fed["L1H1.k"] == fed["L1H1.v"] == ["L1H2", "L1H3"]
    assert fed["mlp0"] == ["mlp0"]
    assert fed["logits"] == []


def test_what_is_no_edge_is_refused():
    graph = Graph(2, 4, 2, False)
    assert graph.edge("L0H3", "mlp0") == (4, graph.reader_index["mlp0"])
    with pytest.raises(ValueError, match=r"no edge mlp1→L0H0\.q"):
        graph.edge("mlp1", "L0H0.q")
    with pytest.raises(ValueError, match=r"'L1H2.k' is not a reader"):
        graph.edge("embed", "L1H2.k")
    with pytest.raises(ValueError, match="do not share"):
        Graph(2, 4, 3, False)
    with pytest.raises(ValueError, match="n_layers is 0"):
        Graph(0, 4, 4, False)
