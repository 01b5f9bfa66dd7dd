"""Circuits whose edges are kept at some positions and cut at others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp.circuits import METHODS, discover, draw, evaluate, load, run_circuits, save, to_networkx
from interp.circuits.edge_scores import attribution_edge_scores, secant_edge_scores
from interp.circuits.exact_edges import exact_edge_scores
from interp.circuits.graph import Graph
from interp.metrics import logit_diff
from interp.tasks import Task
from tests.circuits.brute_force import brute_force_logits
from tests.circuits.tiny import linear_model, tiny_model, tiny_task

ABLE = [name for name, one in METHODS.items() if one.finer]
N_POSITIONS = 7
READ = {"metric": lambda logits, prompts: logit_diff(logits, prompts.answers, prompts.wrong)}


def by_hand(model, task, circuit_mask, graph):
    """The metric of a circuit, run node by node."""
    kept = {
        (writer, reader): torch.from_numpy(circuit_mask[:, w, r].astype(float))
        for w, writer in enumerate(graph.writers)
        for r, reader in enumerate(graph.readers)
    }
    logits = brute_force_logits(model, graph, task.clean, task.corrupted, kept)
    return logit_diff(logits, task.answers, task.wrong)


def test_any_edges_at_any_positions_run_as_they_do_node_by_node():
    model, task = tiny_model("llama"), tiny_task()
    graph = Graph.of(model)
    draws = np.random.default_rng(0).random((2, N_POSITIONS, *graph.exists.shape))
    masks = (draws < np.array([0.5, 0.85])[:, None, None, None]) & graph.exists
    found = run_circuits(model, task, graph, masks, READ)["metric"]
    expected = torch.stack([by_hand(model, task, mask, graph) for mask in masks])
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    everywhere = run_circuits(model, task, graph, masks.any(1), READ)["metric"]
    assert (found - everywhere).abs().min() > 1e-3


def test_a_circuit_that_is_found_is_evaluated_position_by_position(tmp_path):
    model, task = tiny_model("llama"), tiny_task()
    found = discover(model, task, "eap", edges=150, positions=True)
    assert found.mask.shape == (N_POSITIONS, *found.graph.exists.shape)
    assert found.attrs["position_labels"] == list(task.position_labels)
    assert found.size == f"{found.n_edges} of {N_POSITIONS * found.graph.n_edges:,} edges at 7 positions"
    assert found.size in repr(found)
    curve = evaluate(model, task, found, sizes=(0, 0.2, 1))
    expected = float(by_hand(model, task, found.mask, found.graph).mean())
    assert float(curve["circuit_metric"]) == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(curve["faithfulness"].sel(ranking="magnitude")[[0, -1]], [0, 1], atol=1e-6)
    again = load(save(found, tmp_path / "circuit.json"))
    assert (again.mask == found.mask).all()
    assert again.attrs["position_labels"] == found.attrs["position_labels"]


def test_dead_ends_change_nothing():
    model, task = tiny_model("llama"), tiny_task()
    whole = discover(model, task, "random", edges=200, positions=True, prune=False)
    kept = whole.select(edges=200)
    assert 0 < kept.n_edges < whole.n_edges
    values = run_circuits(model, task, whole.graph, np.stack([whole.mask, kept.mask]), READ)["metric"]
    torch.testing.assert_close(values[0], values[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", [name for name in ABLE if name not in ("exact", "random")])
def test_scores_at_all_positions_add_up_to_those_without(method):
    model, task = tiny_model("llama"), tiny_task()
    apart, together = (discover(model, task, method, positions=positions) for positions in (True, False))
    np.testing.assert_allclose(apart.scores.sum(0), together.scores, atol=1e-6)
    assert (np.abs(apart.scores) > 1e-3).any(axis=(1, 2)).sum() > 1
    writer, reader = together.edges[0]
    assert apart.score_of(writer, reader) == pytest.approx(together.score_of(writer, reader), abs=1e-6)


def test_on_a_linear_model_an_edge_at_one_position_does_what_is_estimated():
    model, task = linear_model(), tiny_task(n=1)
    exact = exact_edge_scores(model, task, positions=True)
    assert exact.dims == ("position", "writer", "reader")
    assert tuple(exact["label"].values) == task.position_labels
    for scores in (
        attribution_edge_scores(model, task, positions=True),
        secant_edge_scores(model, task, positions=True),
    ):
        np.testing.assert_allclose(scores.values, exact.values, atol=1e-6)
    assert (np.abs(exact.values) > 1e-3).any(axis=(1, 2)).sum() > 1


def test_exact_effects_at_a_position_are_those_of_runs_without_the_edge_there():
    model, task = tiny_model("llama"), tiny_task(n=1)
    exact = exact_edge_scores(model, task, positions=True)
    graph = Graph.of(model)
    whole = np.repeat(graph.exists[None], N_POSITIONS, axis=0)
    base, empty = (float(by_hand(model, task, mask, graph)) for mask in (whole, whole & False))
    for at, writer, reader in (
        (4, "embed", "L0H1.k"),
        (2, "mlp0", "L1H0.v"),
        (6, "L0H2", "L1H3.q"),
        (6, "L1H2", "mlp1"),
    ):
        mask = whole.copy()
        mask[at, *graph.edge(writer, reader)] = False
        expected = (base - float(by_hand(model, task, mask, graph))) / (base - empty)
        assert float(exact.sel(writer=writer, reader=reader)[at]) == pytest.approx(expected, abs=1e-5)
        assert abs(expected) > 1e-4


def test_random_scores_differ_between_positions():
    model, task = tiny_model("llama"), tiny_task()
    first, again = (discover(model, task, "random", positions=True, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.scores, again.scores)
    assert (first.scores[0][first.graph.exists] != first.scores[1][first.graph.exists]).all()


def test_other_programs_learn_where_an_edge_is_kept():
    circuit = discover(tiny_model("llama"), tiny_task(), "eap", edges=60, positions=True)
    drawn = to_networkx(circuit)
    for writer, target, edge in drawn.edges(data=True):
        if edge["reader"] == "mlp":
            at = [int(one) for one in edge["positions"].split()]
            kept = circuit.mask[:, *circuit.graph.edge(writer, target)]
            assert at == np.flatnonzero(kept).tolist() == circuit.positions_of(writer, target)
    assert "summed over 7 positions" in draw(circuit).layout.title.subtitle.text


def test_bad_choices_are_refused_before_anything_is_run():
    model, task = tiny_model("llama"), tiny_task()
    with pytest.raises(
        ValueError, match=r"positions=True is nothing that 'acdc' can do; methods that can: eap, .*relp"
    ):
        discover(model, task, "acdc", positions=True)
    with pytest.raises(ValueError, match="'node-atp'"):
        discover(model, task, "node-atp", positions=True)
    with pytest.raises(ValueError, match="greedy selection is for scores without"):
        discover(model, task, "eap", positions=True, selection="greedy")
    several = several_lengths(task)
    for refused in (discover, attribution_edge_scores, secant_edge_scores, exact_edge_scores):
        with pytest.raises(ValueError, match="needs prompts of one length, these have 6, 7 tokens"):
            refused(model, several, positions=True)
    circuit = discover(model, task, "eap", positions=True)
    with pytest.raises(ValueError, match="are for prompts of 7 tokens; the task has prompts of 6, 7"):
        evaluate(model, several, circuit)


def several_lengths(task):
    """The task with its first prompt a token shorter."""
    rows = ("clean_ids", "corrupted_ids", "str_tokens", "corrupted_str_tokens")
    kept = ("name", "answers", "wrong", "metric", "clean_text", "corrupted_text", "index")
    short = {name: (getattr(task, name)[0][1:], *getattr(task, name)[1:]) for name in rows}
    return Task(**{name: getattr(task, name) for name in kept}, positions={"END": torch.tensor([5, 6])}, **short)
