"""Circuits compared: overlaps worked out by hand, and transfer at its two ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray as xr

import interp
from interp.circuits.circuit import Circuit
from interp.circuits.evaluate import measured
from interp.circuits.graph import Graph
from interp.circuits.reuse import overlap, top_share_overlap, transfer
from tests.model.families import FAMILIES
from tests.patching.tokens_task import task_of_tokens

GRAPH = Graph(2, 2, 2, False)


def circuit_of(edges, graph=GRAPH):
    scores = np.where(graph.exists, 0.0, np.nan).astype(np.float32)
    mask = np.zeros(graph.exists.shape, dtype=bool)
    for (writer, reader), score in edges.items():
        scores[graph.edge(writer, reader)] = score
        mask[graph.edge(writer, reader)] = True
    return Circuit(graph, scores, mask)


ONE = {("embed", "L0H0.q"): 1.0, ("L0H0", "L1H1.q"): 2.0, ("L1H1", "logits"): 1.0}
OTHER = {("embed", "L0H0.q"): 3.0, ("L0H0", "mlp1"): -1.0}


def tail(n_all, n_one, n_other, n_both):
    """P(as many or more in common) by counting."""
    ways = (math.comb(n_one, k) * math.comb(n_all - n_one, n_other - k) for k in range(n_both, min(n_one, n_other) + 1))
    return sum(ways) / math.comb(n_all, n_other)


def test_overlap_by_hand():
    found = overlap({"a": circuit_of(ONE), "b": circuit_of(OTHER)})
    pair = found.sel(first="a", second="b")
    # Nodes: L0H0, L1H1 and L0H0, mlp1, of 4 heads and 2 MLPs. Edges: 3 and 2, one in common.
    assert float(pair["node_jaccard"]) == pytest.approx(1 / 3)
    assert float(pair["edge_jaccard"]) == pytest.approx(1 / 4)
    assert float(pair["node_share"]) == pytest.approx(1 / 2)
    assert float(pair["edge_share"]) == pytest.approx(1 / 3)
    assert float(found["edge_share"].sel(first="b", second="a")) == pytest.approx(1 / 2)
    assert float(pair["weighted_edge_overlap"]) == pytest.approx(min(1 / 4, 3 / 4))
    assert float(pair["node_p"]) == pytest.approx(tail(6, 2, 2, 1))
    assert float(pair["edge_p"]) == pytest.approx(tail(GRAPH.n_edges, 3, 2, 1))
    assert found["n_nodes"].values.tolist() == [2, 2]
    assert found["n_edges"].values.tolist() == [3, 2]


def test_overlap_of_a_circuit_with_itself():
    own = overlap({"a": circuit_of(ONE), "b": circuit_of(ONE)}).sel(first="a", second="b")
    for name in ("node_jaccard", "edge_jaccard", "node_share", "edge_share", "weighted_edge_overlap", "score_spearman"):
        assert float(own[name]) == pytest.approx(1.0), name


def test_spearman_is_over_all_edges_kept_or_not():
    scores = np.where(GRAPH.exists, np.arange(GRAPH.exists.size).reshape(GRAPH.exists.shape), np.nan)
    nothing = np.zeros(scores.shape, dtype=bool)
    circuits = {"up": Circuit(GRAPH, scores, nothing), "down": Circuit(GRAPH, -(scores**3), nothing.copy())}
    found = overlap(circuits)
    assert float(found["score_spearman"].sel(first="up", second="down")) == pytest.approx(-1.0)
    assert bool(found["edge_jaccard"].isnull().all())
    assert bool(found["edge_p"].isnull().all())


def test_positions_are_summed():
    flat = circuit_of(ONE)
    halves = Circuit(GRAPH, np.stack([flat.scores / 2] * 2), np.stack([flat.mask, np.zeros_like(flat.mask)]))
    pair = overlap({"a": flat, "b": halves}).sel(first="a", second="b")
    assert float(pair["edge_jaccard"]) == 1
    assert float(pair["weighted_edge_overlap"]) == pytest.approx(1)


def test_overlap_refuses():
    with pytest.raises(ValueError, match="two or more"):
        overlap({"a": circuit_of(ONE)})
    with pytest.raises(ValueError, match="different graphs"):
        overlap({"a": circuit_of(ONE), "b": circuit_of({}, Graph(1, 2, 2, False))})


def test_top_shares_by_hand():
    one = xr.DataArray([[9.0, -8.0, 1.0, 0.5], [0.1, 7.0, 0.2, np.nan]], dims=("layer", "head"))
    other = xr.DataArray([[9.0, 0.1, -5.0, 0.5], [0.2, 7.0, 0.3, 1.0]], dims=("layer", "head"))
    found = top_share_overlap({"a": one, "b": other}, shares=(0.01, 3 / 7)).sel(first="a", second="b")
    # Of 7 components scored in both: the best one, then {9, −8, 7} and {9, 7, −5}.
    assert found["n_top"].values.tolist() == [1, 3]
    np.testing.assert_allclose(found["jaccard"], [1, 2 / 4])
    np.testing.assert_allclose(found["share_of_first"], [1, 2 / 3])
    np.testing.assert_allclose(found["p_value"], [tail(7, 1, 1, 1), tail(7, 3, 3, 2)])
    share = np.array([1 / 7, 3 / 7])
    np.testing.assert_allclose(found["chance_jaccard"], share / (2 - share))
    signed = top_share_overlap({"a": one, "b": other}, shares=(3 / 7,), signed=True).sel(first="a", second="b")
    np.testing.assert_allclose(signed["jaccard"], [2 / 4])  # {9, 7, 1} and {9, 7, 0.5}


def test_top_shares_refuse():
    scores = xr.DataArray([1.0, 2.0], dims="node", coords={"node": ["x", "y"]})
    with pytest.raises(ValueError, match="other components"):
        top_share_overlap({"a": scores, "b": scores.assign_coords(node=["x", "z"])})
    for shares in ((0.0,), (1.5,), ()):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            top_share_overlap({"a": scores, "b": scores}, shares=shares)
    with pytest.raises(ValueError, match="two or more"):
        top_share_overlap({"a": scores})
    with pytest.raises(ValueError, match="every task"):
        top_share_overlap({"a": scores.where(scores > 1), "b": scores.where(scores < 2)})


# With a model


@pytest.fixture(scope="module")
def model():
    return interp.load(FAMILIES["llama"].make_model("sdpa"))


def token_task(model, seed):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(model.d_vocab, (3, 6), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 2] = (corrupted[:, 2] + 1) % model.d_vocab
    return task_of_tokens(clean, corrupted)


def test_transfer_is_faithfulness_on_the_other_task(model):
    graph = Graph.of(model)
    scores = np.where(graph.exists, np.random.default_rng(0).normal(size=graph.exists.shape), np.nan)
    some = Circuit(graph, scores, np.zeros(scores.shape, dtype=bool)).select(edges=graph.n_edges // 2, prune=False)
    circuits = {
        "all": Circuit(graph, scores.copy(), graph.exists.copy()),
        "some": some,
        "none": Circuit(graph, scores.copy(), np.zeros(scores.shape, dtype=bool)),
    }
    tasks = {"one": token_task(model, 0), "two": token_task(model, 1)}
    found = transfer(model, tasks, circuits)
    assert found.dims == ("circuit", "task")
    np.testing.assert_allclose(found.sel(circuit="all"), 1, atol=1e-5)
    np.testing.assert_allclose(found.sel(circuit="none"), 0, atol=1e-5)
    for name, task in tasks.items():
        values, said = measured(model, task, graph, [some.mask])
        assert float(found.sel(circuit="some", task=name)) == pytest.approx(
            float(values["faithfulness"].mean()), abs=1e-6
        )
        assert float(found["metric_model"].sel(task=name)) == pytest.approx(said["metric_model"])
    assert found["n_edges"].values.tolist() == [graph.n_edges, some.n_edges, 0]


def test_transfer_refuses(model):
    graph = Graph.of(model)
    task = token_task(model, 0)
    with pytest.raises(ValueError, match="at least one"):
        transfer(model, {}, {})
    with pytest.raises(ValueError, match=r"circuit 'a' .* is of another graph than the model"):
        transfer(model, {"t": task}, {"b": circuit_of({}, graph), "a": circuit_of(ONE)})
    with pytest.raises(ValueError, match=r"circuit 'a' .* is of another graph than the model"):
        transfer(model, {"t": task}, {"a": circuit_of(ONE)})
    scores = np.zeros((6, *graph.exists.shape), dtype=np.float32)
    with pytest.raises(ValueError, match="positions"):
        transfer(model, {"t": task}, {"a": Circuit(graph, scores, np.zeros(scores.shape, dtype=bool))})
