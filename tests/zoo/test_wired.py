"""What `zoo.edges` says, against exact path patching of every edge of the graph."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from interp import metrics, zoo
from interp.circuits import Graph, run_circuits
from interp.patching import edge_effects
from interp.zoo.wiring import Stream

WIRED = ("induction", "duplicate", "llama_induction")
CLEAR, NOTHING = 0.2, 1e-3
"""Shares of the gap between clean and corrupted: least of a circuit's edge, most of any other."""


@cache
def graph_and_edges(name):
    graph = Graph.of(zoo.load(name))
    pairs = np.argwhere(graph.exists)
    return graph, [(graph.writers[writer], graph.readers[reader]) for writer, reader in pairs]


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("name", WIRED)
def test_these_edges_and_no_others_change_the_answer(name, direction):
    model, task, circuit = zoo.load(name), zoo.task(name, n=12), zoo.edges(name)
    graph, pairs = graph_and_edges(name)
    assert len(pairs) == graph.n_edges
    assert circuit < set(pairs)
    found = edge_effects(model, task, [[pair] for pair in pairs], direction=direction, per_prompt=True)
    mean, largest = found.mean("prompt").values, np.abs(found.values).max(axis=0)
    for pair, share, extreme in zip(pairs, mean, largest, strict=True):
        if pair in circuit:
            assert share > CLEAR, pair
        else:
            assert extreme < NOTHING, pair


@pytest.mark.parametrize("name", WIRED)
def test_the_circuit_alone_does_the_task_and_the_rest_alone_does_not(name):
    """Not edge by edge: everything outside (or inside) carries the corrupted run at once."""
    model, task = zoo.load(name), zoo.task(name, n=12)
    graph, _ = graph_and_edges(name)
    circuit = np.zeros_like(graph.exists)
    for edge in zoo.edges(name):
        circuit[graph.edge(*edge)] = True
    masks = np.stack([graph.exists, circuit, graph.exists & ~circuit])

    def score(logits, prompts):
        return metrics.logit_diff(logits, prompts.answers, prompts.wrong)

    whole, alone, rest = run_circuits(model, task, graph, masks, {"score": score})["score"]
    torch.testing.assert_close(alone, whole, rtol=2 * NOTHING, atol=0)
    torch.testing.assert_close(rest, -whole, rtol=2 * NOTHING, atol=0)


@pytest.mark.parametrize("name", WIRED)
def test_distractors_are_busy(name):
    """Heads and MLPs outside the circuit write, and what they write depends on the prompt."""
    model, task = zoo.load(name), zoo.task(name, n=12)
    inside = {node.partition(".")[0] for edge in zoo.edges(name) for node in edge}
    _, clean = model.run_with_cache(task.clean, "result")
    _, corrupted = model.run_with_cache(task.corrupted, "result")
    changed = {
        f"L{layer}H{head}"
        for layer in range(model.n_layers)
        for head in range(model.n_heads)
        if (clean["result", layer] - corrupted["result", layer])[:, :, head].abs().max() > 0.01
    }
    assert len(changed - inside) >= 3


@pytest.mark.parametrize("name", WIRED)
def test_norms_leave_the_stream_as_it_is(name):
    model, task = zoo.load(name), zoo.task(name, n=4)
    sites = ["resid_pre", "blocks.*.ln1.hook_normalized"]
    _, seen = model.run_with_cache(task.clean, sites)
    for layer in range(model.n_layers):
        stream, normed = seen["resid_pre", layer], seen[f"blocks.{layer}.ln1.hook_normalized"]
        unlike = (stream - normed).abs().amax(dim=(0, 1)) > 1e-3
        anchors = stream.abs().amax(dim=(0, 1)) > 100
        centred = name != "llama_induction"
        assert anchors.sum() == (2 if centred else 1)
        assert unlike.sum() <= (3 if centred else 1)
        if centred:
            torch.testing.assert_close(stream.mean(dim=-1), torch.zeros(stream.shape[:2]), atol=1e-5, rtol=0)


def test_attention_of_the_wired_heads_is_where_it_should_be():
    model, task = zoo.load("induction"), zoo.task("induction", n=8)
    _, seen = model.run_with_cache(task.clean, "pattern")
    previous = seen["pattern", 0][:, 2].diagonal(offset=-1, dim1=1, dim2=2)
    assert previous.min() > 0.99
    rows = torch.arange(len(task))
    assert seen["pattern", 1][rows, 1, task.positions["END"], task.positions["B"]].min() > 0.9

    model, task = zoo.load("duplicate"), zoo.task("duplicate", n=8)
    _, seen = model.run_with_cache(task.clean, "pattern")
    at, rows = task.positions, torch.arange(len(task))
    for layer, head, query, key in ((0, 1, "S2", "S1"), (1, 2, "END", "S2"), (2, 0, "END", "IO")):
        assert seen["pattern", layer][rows, head, at[query], at[key]].min() > 0.9


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="d_model=8 is 5 dimensions too few"):
        Stream(8, centred=True, sizes={"token": 10})
