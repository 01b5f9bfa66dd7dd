"""CD-T node scores: the first iteration is contextual patching, later ones follow the algorithm by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import interp
from interp.circuits import contextual_nodes as module
from interp.circuits.contextual_nodes import (
    contextual_node_scores,
    node_relevance,
    normalised_by_layer,
    percentile_ranks,
    upstream_of,
)
from interp.circuits.graph import Graph
from interp.circuits.node_scores import node_array
from interp.patching import contextual_patching
from interp.patching.contextual import Node, contextual_decomposition
from interp.patching.edges import Writer
from tests.model.families import FAMILIES
from tests.patching.linear_model import pairs_of_tokens


def tiny(name="llama"):
    return interp.load(FAMILIES[name].make_model("eager", torch.float64))


def test_effects_of_the_first_iteration_are_contextual_patching():
    model, task = tiny(), pairs_of_tokens()
    found = contextual_node_scores(model, task, n_iterations=1, by_layer=False, progress=False)
    heads = contextual_patching(model, task, site="z", by=("layer", "head"), direction="noise", progress=False)
    mlps = contextual_patching(model, task, site="mlp_out", by=("layer",), direction="noise", progress=False)
    expected = [np.nan]
    for layer in range(model.n_layers):
        expected += [*heads.sel(layer=layer).values, float(mlps.sel(layer=layer))]
    np.testing.assert_allclose(found["effect"], expected, rtol=1e-5)
    order = np.argsort(np.abs(expected[1:]))
    np.testing.assert_allclose(found.values[1:][order], np.arange(1, 16) / 15, rtol=1e-6)
    assert np.isnan(found.values[0])
    best = found["node"].values[1:][order[-1]]
    assert found["node"].values[found["iteration"].values == 1].tolist() == [best]


def test_relevance_one_source_and_target_at_a_time():
    model, task = tiny(), pairs_of_tokens()
    targets = ["L2H1", "mlp1", "L1H3"]
    found = node_relevance(model, task, targets, progress=False)
    _, corrupted = model.run_with_cache(task.corrupted, ["z", "mlp_out"])
    _, clean = model.run_with_cache(task.clean, ["z", "mlp_out"])
    upstream = {
        "L2H1": [*(f"L{layer}H{head}" for layer in (0, 1) for head in range(4)), "mlp0", "mlp1"],
        "mlp1": [*(f"L{layer}H{head}" for layer in (0, 1) for head in range(4)), "mlp0"],
        "L1H3": [*(f"L0H{head}" for head in range(4)), "mlp0"],
    }
    expected = {}
    for target, sources in upstream.items():
        site, head = Writer.parse(target).site, Writer.parse(target).head
        for source in sources:
            writer = Writer.parse(source)
            for row in range(len(task)):
                parts = contextual_decomposition(
                    model,
                    task.clean[row : row + 1],
                    [Node(writer.site, head=writer.head)],
                    targets=site,
                    reference={writer.site: corrupted[writer.site][row : row + 1]},
                    progress=False,
                )
                own, whole = parts.relevant[site][0, 0], clean[site][row]
                if head is not None:
                    own, whole = own[:, head], whole[:, head]
                share = own.abs().sum() / (own.abs().sum() + (whole - own).abs().sum())
                expected[source] = expected.get(source, 0.0) + float(share) / len(task)
    for name in found["node"].values:
        if name in expected:
            assert float(found.sel(node=name)) == pytest.approx(expected[name], rel=1e-5)
        else:
            assert bool(np.isnan(found.sel(node=name)))


def test_relevance_does_not_depend_on_chunks(monkeypatch):
    model, task = tiny(), pairs_of_tokens()
    whole = node_relevance(model, task, ["L2H1", "mlp2"], progress=False)
    monkeypatch.setattr(module, "FLOATS_HELD", 2500)
    np.testing.assert_allclose(node_relevance(model, task, ["L2H1", "mlp2"], batch_size=2, progress=False), whole, 1e-5)


def test_iterations_by_hand():
    """Targets of an iteration are the nodes that the one before found; the score is the best rank of all."""
    model, task = tiny(), pairs_of_tokens()
    options = {"percentile": 80.0, "by_layer": False, "progress": False}
    names = np.array(Graph.of(model).writers[1:])
    relevance = abs(contextual_node_scores(model, task, n_iterations=1, **options)["effect"].values[1:])
    best, iteration = np.zeros(15), np.zeros(15, dtype=int)
    for step in (1, 2, 3):
        seen = np.flatnonzero(~np.isnan(relevance))
        ranks = np.full(15, np.nan)
        ranks[seen[np.argsort(relevance[seen])]] = np.arange(1, len(seen) + 1) / len(seen)
        best = np.fmax(best, ranks)
        joined = ranks > 0.8
        iteration[joined & (iteration == 0)] = step
        relevance = node_relevance(model, task, list(names[joined]), progress=False).values[1:]
    found = contextual_node_scores(model, task, n_iterations=3, **options)
    np.testing.assert_allclose(found.values[1:], best, rtol=1e-6)
    np.testing.assert_array_equal(found["iteration"].values[1:], iteration)
    assert iteration.max() > 1


def test_mean_ablation_and_layers_are_taken_up():
    model, task = tiny("gpt2"), pairs_of_tokens()
    found = contextual_node_scores(model, task, ablation="mean", n_iterations=2, progress=False)
    np.testing.assert_array_equal(
        found, contextual_node_scores(model, task, ablation="mean", n_iterations=2, progress=False)
    )
    other = contextual_node_scores(model, task, n_iterations=2, progress=False)
    assert bool((found["effect"] != other["effect"])[1:].any())
    assert found.attrs["ablation"] == "mean"
    assert found.attrs["unsigned"] == 1
    assert {"model", "task", "metric", "direction", "seconds"} <= set(found.attrs)


def test_growth_ends_when_nothing_is_before_the_targets():
    family = FAMILIES["gpt_neox"]
    family = replace(family, config=family.config | {"num_hidden_layers": 1})
    model, task = interp.load(family.make_model("eager")), pairs_of_tokens()
    found = contextual_node_scores(model, task, n_iterations=5, percentile=0.0, progress=False)
    assert int(found["iteration"].max()) == 1


def test_nodes_that_share_the_first_place_join(monkeypatch):
    """None of three equals has a rank above the 95th percentile of 15 nodes."""
    model, task = tiny("gpt2"), pairs_of_tokens()
    names = Graph.of(model).writers
    effects = dict.fromkeys(names[1:], 0.1) | {"L0H2": -0.5, "L2H1": 0.5, "mlp2": 0.5}
    monkeypatch.setattr(module, "_effects", lambda *_: node_array(names, effects, {}))
    found = contextual_node_scores(model, task, n_iterations=1, by_layer=False, progress=False)
    assert found["node"].values[found["iteration"].values == 1].tolist() == ["L0H2", "L2H1", "mlp2"]


def test_by_layer_a_node_is_held_against_its_own_layer(monkeypatch):
    model, task = tiny("gpt2"), pairs_of_tokens()
    names = Graph.of(model).writers
    # All of layer 0 is strong; in layer 2 one node is far above the others.
    effects = {name: 9.0 if name[1] == "0" or name == "mlp0" else 0.01 for name in names[1:]} | {
        "L0H0": 10.0,
        "L2H3": 1.0,
    }
    monkeypatch.setattr(module, "_effects", lambda *_: node_array(names, effects, {}))
    for by_layer, expected in ((True, "L2H3"), (False, "L0H0")):
        found = contextual_node_scores(model, task, n_iterations=1, by_layer=by_layer, progress=False)
        assert found["node"].values[found["iteration"].values == 1].tolist() == [expected]


def test_upstream_of_parallel_and_sequential_blocks():
    for name, parallel in (("llama", False), ("gpt_neox", True)):
        graph = Graph.of(tiny(name))
        found = upstream_of(graph, ["mlp1", "L1H0", "L0H2"])
        own_layer = [graph.writer_index[f"L1H{head}"] for head in range(4)]
        assert bool(found[own_layer, 0].all()) is not parallel
        assert not found[own_layer, 1].any()
        assert not found[:, 2].any()
        assert found[graph.writer_index["mlp0"], :2].all()
        assert not found[0].any()


def test_ranks_and_layers_by_hand():
    np.testing.assert_allclose(percentile_ranks(np.array([3.0, np.nan, 1.0, 3.0])), [2.5 / 3, np.nan, 1 / 3, 2.5 / 3])
    found = normalised_by_layer(np.array([1.0, 3.0, 0.0, 0.0, np.nan, 2.0]), np.array([0, 0, 1, 1, 2, 2]))
    np.testing.assert_allclose(found, [0.5, 1.5, 0, 0, np.nan, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_iterations": 0}, "n_iterations=0; it is 1 or more"),
        ({"percentile": 100.0}, "percentile=100.0"),
        ({"ablation": "zero"}, "ablation='zero'; it is one of resample, mean"),
    ],
)
def test_bad_choices(options, message, monkeypatch):
    model = tiny()
    monkeypatch.setattr(model, "_forward", None)
    with pytest.raises(ValueError, match=message):
        contextual_node_scores(model, pairs_of_tokens(), **options)
