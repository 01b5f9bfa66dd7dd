"""Circuits compared: overlaps worked out by hand, transfer at its two ends, and steered attention by brute force."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

import interp
from interp.circuits.circuit import Circuit
from interp.circuits.evaluate import measured
from interp.circuits.graph import Graph
from interp.circuits.reuse import overlap, top_share_overlap, transfer
from interp.circuits.steering import row_edits, steer
from interp.metrics import logit_diff
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
    with pytest.raises(ValueError, match="shares"):
        top_share_overlap({"a": scores, "b": scores}, shares=(0.0,))
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
    task = task_of_tokens(clean, corrupted)
    return replace(task, positions={**task.positions, "A": torch.tensor([0, 1, 2]), "B": torch.tensor([3, 1, 4])})


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
    both = {"a": circuit_of(ONE), "b": circuit_of({}, graph)}
    with pytest.raises(ValueError, match="another graph"):
        transfer(model, {"t": task}, both)
    scores = np.zeros((6, *graph.exists.shape), dtype=np.float32)
    with pytest.raises(ValueError, match="positions"):
        transfer(model, {"t": task}, {"a": Circuit(graph, scores, np.zeros(scores.shape, dtype=bool))})


def test_rows_are_what_was_asked_for_and_nothing_else_changes(model):
    task = token_task(model, 0)
    edits = row_edits(model, task, ["L1H0", "L1H2", "L0H1"], ["A", "B"], fractions=[0.7, 0.2])
    _, plain = model.run_with_cache(task.clean, "pattern")
    with model.edited(edits):
        _, cache = model.run_with_cache(task.clean, ["pattern", "z", "v"])
    row = torch.zeros(3, 6)
    for prompt, (first, second) in enumerate([(0, 3), (1, 1), (2, 4)]):
        row[prompt, first] += 0.7
        row[prompt, second] += 0.2
    for layer, head in ((1, 0), (1, 2), (0, 1)):
        torch.testing.assert_close(cache["pattern", layer][:, head, -1], row)
        group = head * model.n_kv_heads // model.n_heads
        torch.testing.assert_close(
            cache["z", layer][:, -1, head], torch.einsum("pk,pkd->pd", row, cache["v", layer][:, :, group])
        )
    untouched = [head for head in range(model.n_heads) if head != 1]
    torch.testing.assert_close(cache["pattern", 0][:, untouched], plain["pattern", 0][:, untouched])
    torch.testing.assert_close(cache["pattern", 0][:, 1, :-1], plain["pattern", 0][:, 1, :-1])


def test_no_place_at_all_is_a_row_of_zeros(model):
    task = token_task(model, 0)
    with model.edited(row_edits(model, task, ["L0H0"], [])):
        _, cache = model.run_with_cache(task.clean, "z")
    assert not cache["z", 0][:, -1, 0].any()


def test_steer_is_the_edited_run_also_over_lengths_and_batches(model):
    short = token_task(model, 0)
    longer = task_of_tokens(
        torch.cat([short.clean, short.clean[:, :2]], 1), torch.cat([short.corrupted, short.clean[:, :2]], 1)
    )
    longer = replace(longer, positions={**longer.positions, "A": torch.tensor([5, 6, 7]), "B": torch.tensor([0, 0, 1])})
    joined = _joined(short, longer)
    found = steer(model, joined, ["L1H0", "L0H1"], ["A", "B"], batch_size=2)
    expected = []
    for task in (short, longer):
        with model.edited(row_edits(model, task, ["L1H0", "L0H1"], ["A", "B"])):
            expected.append(logit_diff(model(task.clean)[:, -1], task.answers, task.wrong))
    expected = torch.stack(expected, 1).flatten().numpy()  # prompts alternate in the joined task
    np.testing.assert_allclose(found["metric"].sel(run="steered"), expected, atol=1e-5)
    plain = logit_diff(model(short.clean)[:, -1], short.answers, short.wrong)
    np.testing.assert_allclose(found["metric"].sel(run="plain")[::2], plain, atol=1e-5)
    assert np.abs(found["metric"].sel(run="steered") - found["metric"].sel(run="plain")).max() > 1e-3
    gained = (found["top1"].sel(run="steered") > found["top1"].sel(run="plain")).sum()
    assert found.attrs["n_repaired"] == int(gained)


def _joined(one, other):
    rows = [(task, row) for row in range(len(one)) for task in (one, other)]
    picked = {
        name: tuple(getattr(task, name)[row] for task, row in rows)
        for name in ("clean_ids", "corrupted_ids", "clean_text", "corrupted_text", "str_tokens", "corrupted_str_tokens")
    }
    tensors = {name: torch.stack([getattr(task, name)[row] for task, row in rows]) for name in ("answers", "wrong")}
    positions = {name: torch.stack([task.positions[name][row] for task, row in rows]) for name in one.positions}
    return replace(one, **picked, **tensors, positions=positions, index=torch.arange(len(rows)))


def test_row_edits_refuse_before_any_run(model):
    task = token_task(model, 0)
    for heads, onto, fractions, message in (
        (["mlp0"], ["A"], None, "not a head"),
        (["L0H99"], ["A"], None, "out of range"),
        (["L0H0"], ["C"], None, "not a key position"),
        (["L0H0"], ["A", "B"], [1.0], "one for each"),
        (["L0H0"], ["A", "B"], [0.7, 0.7], "at most 1"),
        (["L0H0"], torch.full((3, 1), 6), None, "positions 0..5"),
    ):
        with pytest.raises(ValueError, match=message):
            row_edits(model, task, heads, onto, fractions=fractions)
