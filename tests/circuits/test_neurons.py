"""Neurons as writers of their own, beside the rest of their MLP."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from interp.circuits import METHODS, discover, draw, evaluate, load, run_circuits, save, strongest_paths, to_networkx
from interp.circuits.edge_scores import attribution_edge_scores, secant_edge_scores
from interp.circuits.exact_edges import exact_edge_scores
from interp.circuits.graph import Graph
from interp.circuits.selection import top_neurons
from interp.metrics import logit_diff
from interp.model import Edit
from interp.model.sites import SiteUnavailable
from interp.patching import attribution_patching
from tests.circuits.brute_force import brute_force_logits
from tests.circuits.tiny import tiny_model, tiny_task

CHOSEN = ((0, 3), (0, 17), (1, 5))
FAMILIES = ("gpt2", "gpt_neox", "llama", "granite", "bloom", "opt")
"""Plain and gated MLPs, parallel blocks, scaled residuals, an MLP that adds the stream itself, positions flattened."""
READ = {"metric": lambda logits, prompts: logit_diff(logits, prompts.answers, prompts.wrong)}


def metric_of(model, tokens, task, edits=()):
    with model.edited(list(edits)):
        return logit_diff(model(tokens, logits_to_keep=1)[:, -1], task.answers, task.wrong)


def parts_of(scores, layer):
    """Rows of an MLP and its neurons."""
    return [name for name in map(str, scores["writer"].values) if name.split(".")[0] == f"mlp{layer}"]


def test_neurons_write_behind_the_rest_of_their_mlp():
    graph, plain = Graph(3, 4, 2, False, CHOSEN), Graph(3, 4, 2, False)
    assert [name for name in graph.writers if name.startswith("mlp")] == [
        "mlp0", "mlp0.n3", "mlp0.n17", "mlp1", "mlp1.n5", "mlp2",
    ]  # fmt: skip
    assert graph.readers == plain.readers
    assert [graph.writers[graph.mlp(layer)] for layer in range(3)] == ["mlp0", "mlp1", "mlp2"]
    assert [graph.writers[graph.head(layer, 1)] for layer in range(3)] == ["L0H1", "L1H1", "L2H1"]
    assert graph.writers[graph.mlp_parts(0)] == ("mlp0", "mlp0.n3", "mlp0.n17")
    assert graph.writer_layer.tolist() == [-1, *[0] * 7, *[1] * 6, *[2] * 5]
    for name in graph.writers:  # each neuron has the edges of its MLP
        np.testing.assert_array_equal(
            graph.exists[graph.writer_index[name]], plain.exists[plain.writer_index[name.partition(".")[0]]]
        )
    assert graph.n_edges == graph.exists.sum()
    fed = graph.feeds[graph.reader_index["mlp0"]]
    assert [graph.writers[index] for index in np.flatnonzero(fed)] == ["mlp0", "mlp0.n3", "mlp0.n17"]
    assert Graph(3, 4, 2, False, [[1, 5], (0, 17), (0, 3)]) == graph
    assert "3 neurons by themselves" in str(graph)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_edges_give_the_model_and_neurons_are_cut_as_an_edit_cuts_them(name):
    """A neuron without edges out of it is one whose value an edit replaces, for every kind of MLP."""
    model, task = tiny_model(name), tiny_task()
    graph = Graph.of(model, neurons=CHOSEN)
    cut = graph.exists.copy()
    cut[[graph.writer_index["mlp0.n17"], graph.writer_index["mlp1.n5"]]] = False
    found = run_circuits(model, task, graph, np.stack([graph.exists, cut, cut & False]), READ)["metric"].double()
    _, other = model.run_with_cache(task.corrupted, ["mlp_post"])
    edits = [Edit(f"blocks.{at}.mlp.hook_post", neurons=[n], value=other["mlp_post", at]) for at, n in CHOSEN[1:]]
    expected = [
        metric_of(model, task.clean, task),
        metric_of(model, task.clean, task, edits),
        metric_of(model, task.corrupted, task),
    ]
    torch.testing.assert_close(found, torch.stack(expected).double(), atol=2e-6, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 1e-5


def test_any_edges_run_as_they_do_node_by_node():
    model, task = tiny_model("llama"), tiny_task()
    graph = Graph.of(model, neurons=CHOSEN)
    masks = (np.random.default_rng(0).random((2, 7, *graph.exists.shape)) < 0.7) & graph.exists
    for mask in (masks, masks[:, 0]):
        found = run_circuits(model, task, graph, mask, READ)["metric"].double()
        for one, value in zip(mask, found, strict=True):
            kept = {
                (writer, reader): torch.from_numpy(
                    np.broadcast_to(one, (7, *graph.exists.shape))[:, w, r].astype(float)
                )
                for w, writer in enumerate(graph.writers)
                for r, reader in enumerate(graph.readers)
            }
            logits = brute_force_logits(model, graph, task.clean, task.corrupted, kept)
            torch.testing.assert_close(value, logit_diff(logits, task.answers, task.wrong), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_of_the_parts_add_up_to_those_of_the_mlp(name):
    model, task = tiny_model(name), tiny_task()
    of_node = attribution_patching(model, task, site="mlp_post", by=("layer", "neuron"), direction="noise")
    methods = [
        ("eap", attribution_edge_scores),
        ("relp", lambda *of, **more: attribution_edge_scores(*of, rules="relp", **more)),
    ]
    if name != "bloom":
        methods.append(("secant", secant_edge_scores))
    for method, score in methods:
        whole, apart = score(model, task), score(model, task, neurons=CHOSEN)
        for layer in range(model.n_layers):
            parts = apart.sel(writer=parts_of(apart, layer)).sum("writer", skipna=False)
            np.testing.assert_allclose(parts.values, whole.sel(writer=f"mlp{layer}").values, atol=1e-6)
        others = [one for one in map(str, whole["writer"].values) if not one.startswith("mlp")]
        np.testing.assert_allclose(apart.sel(writer=others).values, whole.sel(writer=others).values, atol=1e-6)
        if method == "eap":
            for layer, neuron in CHOSEN:
                out = float(apart.sel(writer=f"mlp{layer}.n{neuron}").sum())
                assert out == pytest.approx(float(of_node.sel(layer=layer, neuron=neuron)), abs=1e-6)


def test_exact_effects_of_a_neuron_are_those_of_runs_without_its_edge():
    model, task = tiny_model("llama"), tiny_task()
    exact = exact_edge_scores(model, task, neurons=CHOSEN)
    base, other = (metric_of(model, tokens, task).mean() for tokens in (task.clean, task.corrupted))
    change = {}
    for at, tokens in (("clean", task.clean), ("corrupted", task.corrupted)):
        _, cache = model.run_with_cache(tokens, ["mlp_post"])
        change[at] = cache["mlp_post", 1][..., 5, None] * model.weights.of_block("W_out", 1)[5]
    without = [Edit(f"blocks.{model.n_layers - 1}.hook_resid_post", add=change["corrupted"] - change["clean"])]
    expected = (base - metric_of(model, task.clean, task, without).mean()) / (base - other)
    assert float(exact.sel(writer="mlp1.n5", reader="logits")) == pytest.approx(float(expected), abs=1e-6)
    assert abs(float(expected)) > 1e-5


def test_a_circuit_of_neurons_is_found_tested_stored_and_drawn(tmp_path):
    model, task = tiny_model("llama"), tiny_task()
    scores = attribution_patching(model, task, site="mlp_post", by=("layer", "neuron"))
    neurons = top_neurons(scores, 6)
    circuit = discover(model, task, "relp", neurons=neurons, edges=80, selection="greedy")
    assert circuit.graph == Graph.of(model, neurons=neurons)
    kept = [name for name in circuit.nodes if "." in name]
    assert kept
    curve = evaluate(model, task, circuit, sizes=(0, 0.5, 1))
    np.testing.assert_allclose(curve["faithfulness"].sel(ranking="magnitude")[[0, -1]], [0, 1], atol=1e-6)
    again = load(save(circuit, tmp_path / "circuit.json"))
    assert again.graph == circuit.graph
    assert again.edges == circuit.edges
    assert {name for name, node in to_networkx(circuit).nodes(data=True) if node["kind"] == "neuron"} == set(kept)
    figure = draw(circuit)
    assert {one.text for one in figure.layout.annotations} >= set(kept)
    flow = discover(model, task, "secant", neurons=neurons, edges=80)
    assert strongest_paths(flow, n_paths=10**6)["flow"].sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "method", [name for name, one in METHODS.items() if one.finer and name not in ("exact", "eap-ig-activations")]
)
def test_every_method_that_can_scores_neurons_at_positions_too(method):
    model, task = tiny_model("llama", torch.float32), tiny_task()
    circuit = discover(model, task, method, neurons=CHOSEN, positions=True)
    assert circuit.scores.shape == (7, *Graph.of(model, neurons=CHOSEN).exists.shape)
    assert np.isfinite(circuit.scores[:, circuit.graph.exists]).all()


def test_files_without_neurons_are_as_they_were(tmp_path):
    circuit = discover(tiny_model("llama"), tiny_task(), "random")
    content = json.loads(save(circuit, tmp_path / "circuit.json").read_text())
    assert content["graph"] == {"n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "parallel": False}
    assert load(tmp_path / "circuit.json").graph == circuit.graph


def test_top_neurons_are_the_largest():
    model, task = tiny_model("gpt2"), tiny_task()
    scores = attribution_patching(model, task, site="mlp_post", by=("layer", "neuron"))
    chosen = top_neurons(scores, 4)
    magnitudes = np.sort(np.abs(scores.values), axis=None)[::-1]
    assert sorted(abs(float(scores.sel(layer=at, neuron=n))) for at, n in chosen)[::-1] == magnitudes[:4].tolist()
    with pytest.raises(ValueError, match=r"n=100000 is outside"):
        top_neurons(scores, 100_000)
    with pytest.raises(ValueError, match="scores have the axes neuron, layer"):
        top_neurons(scores.T, 3)


def test_what_cannot_be_is_refused():
    task = tiny_task()
    llama = tiny_model("llama")
    width = len(llama.weights.of_block("W_out", 0))
    for neurons, message in (
        (((0, width),), f"neuron {width} of layer 0 is out of range; they run 0..{width - 1}"),
        (((9, 0),), "layer 9 is out of range; layers run 0..2"),
        (((0, 1), (0, 1)), "a neuron is named twice"),
        (((0, -1),), "is no neuron"),
        (((0,),), "is no neuron"),
        ({0: [3]}, r"\(0,\) is no neuron; neurons are \(layer, neuron\)"),
    ):
        with pytest.raises(ValueError, match=message):
            discover(llama, task, "eap", neurons=neurons)
    with pytest.raises(ValueError, match="gemma2 norms what an MLP writes"):
        attribution_edge_scores(tiny_model("gemma2"), task, neurons=CHOSEN)
    with pytest.raises(SiteUnavailable, match="mixture of experts"):
        attribution_edge_scores(tiny_model("qwen3_moe"), task, neurons=CHOSEN)
    with pytest.raises(ValueError, match="neurons= is nothing that 'hisp' can do; methods that can: eap"):
        discover(llama, task, "hisp", neurons=CHOSEN)
