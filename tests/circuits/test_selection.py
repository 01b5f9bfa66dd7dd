"""Selection against plain Python on small graphs."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest

from interp.circuits.circuit import Circuit
from interp.circuits.graph import Graph
from interp.circuits.selection import (
    above_threshold,
    edge_scores_of_nodes,
    greedy_edges,
    top_edges,
    without_dead_ends,
)

GRAPH = Graph(3, 4, 2, False)


def random_scores(seed):
    draws = np.random.default_rng(seed).normal(size=GRAPH.exists.shape)
    return np.where(GRAPH.exists, draws, np.nan).astype(np.float32)


def ways(mask):
    """The kept edges as a graph of nodes; keys and values lead to all heads of their group."""
    found = nx.DiGraph()
    found.add_nodes_from(["embed", "logits"])
    for writer, reader in np.argwhere(mask):
        targets = [GRAPH.writers[index] for index in np.flatnonzero(GRAPH.feeds[reader])] or ["logits"]
        found.add_edges_from((GRAPH.writers[writer], target) for target in targets)
    return found


@pytest.mark.parametrize("signed", [False, True])
def test_top_edges_are_the_largest(signed):
    scores = random_scores(0)
    kept = top_edges(GRAPH, scores, 25, signed=signed)
    ranked = scores if signed else np.abs(scores)
    assert kept.sum() == 25
    assert ranked[kept].min() >= ranked[GRAPH.exists & ~kept].max()
    threshold = float(ranked[kept].min())
    assert (above_threshold(GRAPH, scores, threshold, signed=signed) == kept).all()


def test_ties_are_broken_by_the_order_of_the_graph():
    kept = top_edges(GRAPH, np.where(GRAPH.exists, 1.0, np.nan), 5)
    assert np.flatnonzero(kept).tolist() == np.flatnonzero(GRAPH.exists)[:5].tolist()


@pytest.mark.parametrize("seed", range(5))
def test_pruning_keeps_what_is_on_a_way_from_embedding_to_logits(seed):
    mask = top_edges(GRAPH, random_scores(seed), 40)
    kept = without_dead_ends(GRAPH, mask)
    graph = ways(mask)
    on_way = (nx.descendants(graph, "embed") | {"embed"}) & (nx.ancestors(graph, "logits") | {"logits"})
    for writer, reader in np.argwhere(mask):
        targets = [GRAPH.writers[index] for index in np.flatnonzero(GRAPH.feeds[reader])] or ["logits"]
        expected = GRAPH.writers[writer] in on_way and any(target in on_way for target in targets)
        assert kept[writer, reader] == expected, (GRAPH.writers[writer], GRAPH.readers[reader])


@pytest.mark.parametrize("seed", range(5))
def test_with_positions_ways_run_forward_and_end_at_the_last(seed):
    """Nodes are (node, position): a key or value leads to all positions from its own on, everything else stays."""
    n_positions = 3
    draws = np.random.default_rng(seed).normal(size=(n_positions, *GRAPH.exists.shape))
    mask = top_edges(GRAPH, draws, 90)
    graph = nx.DiGraph()
    sources, end = [("embed", position) for position in range(n_positions)], ("logits", n_positions - 1)
    graph.add_nodes_from([*sources, end])

    def targets(position, reader):
        last = n_positions if GRAPH.readers[reader][-2:] in (".k", ".v") else position + 1
        names = [GRAPH.writers[index] for index in np.flatnonzero(GRAPH.feeds[reader])] or ["logits"]
        return [(name, later) for name in names for later in range(position, last)]

    for position, writer, reader in np.argwhere(mask):
        graph.add_edges_from(((GRAPH.writers[writer], position), target) for target in targets(position, reader))
    fed = set(sources).union(*(nx.descendants(graph, source) for source in sources))
    on_way = fed & (nx.ancestors(graph, end) | {end})
    expected = np.zeros_like(mask)
    for position, writer, reader in np.argwhere(mask):
        is_on = (GRAPH.writers[writer], position) in on_way
        expected[position, writer, reader] = is_on and any(target in on_way for target in targets(position, reader))
    kept = without_dead_ends(GRAPH, mask)
    assert (kept == expected).all()
    assert 0 < kept.sum() < mask.sum()


@pytest.mark.parametrize("seed", range(3))
def test_greedy_takes_the_best_edge_that_leads_to_the_circuit(seed):
    scores, kept = random_scores(seed), np.zeros(GRAPH.exists.shape, dtype=bool)
    for _ in range(30):  # the slow, obvious twin: look at every edge every time
        written = kept.any(1)
        is_open = (GRAPH.feeds & written).any(1)
        is_open[-1] = True
        candidates = np.where(GRAPH.exists & ~kept & is_open, np.abs(scores), -1.0)
        kept[np.unravel_index(candidates.argmax(), kept.shape)] = True
    found = greedy_edges(GRAPH, scores, 30)
    assert (found == kept).all()
    assert nx.ancestors(ways(found), "logits") >= {GRAPH.writers[index] for index in np.flatnonzero(found.any(1))}


def test_edges_of_node_scores_lie_between_the_best_nodes():
    scores = np.zeros(len(GRAPH.writers))
    for name, score in {"L0H1": 3.0, "L1H2": -2.0, "mlp2": 1.0}.items():
        scores[GRAPH.writer_index[name]] = score
    edges = edge_scores_of_nodes(GRAPH, scores)
    assert edges[GRAPH.edge("L0H1", "L1H2.q")] == -2.0
    assert edges[GRAPH.edge("L0H1", "L1H1.k")] == -2.0  # the key of L1H2's group
    assert edges[GRAPH.edge("L1H2", "mlp2")] == 1.0
    assert edges[GRAPH.edge("L1H2", "logits")] == -2.0
    assert edges[GRAPH.edge("embed", "L0H1.q")] == 3.0
    assert edges[GRAPH.edge("L0H2", "L1H2.q")] == 0.0
    assert edges[GRAPH.edge("embed", "logits")] == np.nanmax(edges)
    assert np.isnan(edges[~GRAPH.exists]).all()


def test_bad_choices_are_refused():
    circuit = Circuit(GRAPH, random_scores(0), np.zeros(GRAPH.exists.shape, dtype=bool))
    with pytest.raises(ValueError, match="give edges or threshold"):
        circuit.select()
    with pytest.raises(ValueError, match="is outside 0"):
        circuit.select(edges=10_000)
    with pytest.raises(ValueError, match="one of top, greedy"):
        circuit.select(edges=3, selection="best")
