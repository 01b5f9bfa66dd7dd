"""Edge scores against gradients of masks, against exact effects, and against what has to add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
from interp.circuits.edge_scores import attribution_edge_scores, secant_edge_scores
from interp.circuits.exact_edges import exact_edge_scores
from interp.circuits.graph import Graph
from interp.circuits.split_run import Reference, SplitRun
from interp.circuits.writers import HeadOutputs, writer_outputs
from interp.patching import attribution_patching, relevance_patching, secant_patching
from tests.circuits.tiny import EDGE_FAMILIES, TEXT_FAMILIES, linear_model, mean_difference, tiny_model, tiny_task

OUTSIDE_INTERFACE = ("gpt_neo", "gptj", "bloom", "falcon")


def mask_gradient(model, task, direction):
    """d metric / d mask with all edges there, as a share of the gap."""
    graph, heads = Graph.of(model), HeadOutputs(model)
    base, other = (task.clean, task.corrupted) if direction == "noise" else (task.corrupted, task.clean)
    reference, other_logits = writer_outputs(model, graph, other, heads)
    run = SplitRun(model, graph, base, Reference(reference), heads)
    mask = torch.from_numpy(graph.exists).double()[None].requires_grad_()
    value = mean_difference(run.logits(mask)[0], task)
    (gradient,) = torch.autograd.grad(value, mask)
    gap = value.item() - float(mean_difference(other_logits, task))
    return np.where(graph.exists, gradient[0].numpy() / gap, np.nan)


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_eap_is_the_gradient_of_masks(name, direction):
    model, task = tiny_model(name), tiny_task()
    scores = attribution_edge_scores(model, task, direction=direction)
    expected = mask_gradient(model, task, direction)
    # Norms of some families round to float32 inside.
    np.testing.assert_allclose(scores.values, expected, atol=3e-6 * np.nanmax(np.abs(expected)), rtol=0)
    assert np.nanmax(np.abs(expected)) > 1e-2


@pytest.mark.parametrize("name", EDGE_FAMILIES)
def test_positions_and_batches_add_up(name):
    model, task = tiny_model(name), tiny_task(n=3)
    scores = attribution_edge_scores(model, task, rules="relp")
    by_position = attribution_edge_scores(model, task, rules="relp", positions=True, batch_size=1)
    np.testing.assert_allclose(by_position.values.sum(0), scores.values, atol=1e-6)
    assert by_position.dims == ("position", "writer", "reader")


@pytest.mark.parametrize("name", EDGE_FAMILIES)
def test_edges_out_of_a_node_add_up_to_its_score(name):
    """A node's score is what all edges out of it carry, for plain gradients, rules and multipliers."""
    model, task = tiny_model(name), tiny_task()
    graph = Graph.of(model)
    pairs = [
        (attribution_edge_scores(model, task), lambda **of: attribution_patching(model, task, direction="noise", **of)),
        (
            attribution_edge_scores(model, task, rules="relp"),
            lambda **of: relevance_patching(model, task, direction="noise", **of),
        ),
    ]
    if not name.startswith(OUTSIDE_INTERFACE):
        pairs.append((secant_edge_scores(model, task), lambda **of: secant_patching(model, task, **of)))
    for scores, nodes in pairs:
        out = np.nansum(scores.values, axis=1)
        mlps = nodes(site="mlp_out", by=("layer",)).values
        np.testing.assert_allclose(out[[graph.mlp(layer) for layer in range(graph.n_layers)]], mlps, atol=2e-5)
        np.testing.assert_allclose(out[0], nodes(site="embed", by=()).values, atol=2e-5)
        if name != "gemma3_text":  # behind a norm only the heads of a layer together
            heads = nodes(site="z", by=("layer", "head")).values
            found = np.stack([out[graph.heads_of(layer)] for layer in range(graph.n_layers)])
            np.testing.assert_allclose(found, heads, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in TEXT_FAMILIES if not name.startswith(OUTSIDE_INTERFACE)])
def test_secant_flow_is_conserved(name):
    model, task = tiny_model(name), tiny_task()
    graph, scores = Graph.of(model), np.nan_to_num(secant_edge_scores(model, task).values)
    into, out = scores.sum(0), scores.sum(1)
    assert into[-1] == pytest.approx(1, abs=1e-5)
    for layer in range(graph.n_layers):
        heads, attention = graph.heads_of(layer), graph.attention_readers(layer)
        assert into[attention].sum() == pytest.approx(out[heads].sum(), abs=1e-5)
        assert into[graph.mlp_reader(layer)] == pytest.approx(out[graph.mlp(layer)], abs=1e-5)
        if graph.n_kv_heads == graph.n_heads:
            by_head = into[attention].reshape(3, graph.n_heads).sum(0)
            np.testing.assert_allclose(by_head, out[heads], atol=1e-5)


def test_on_a_linear_model_all_methods_are_exact():
    """No MLP, no norm, and attention that looks everywhere alike: the metric is linear in every edge."""
    model, task = linear_model(), tiny_task()
    exact = exact_edge_scores(model, task).values
    for scores in (
        attribution_edge_scores(model, task),
        attribution_edge_scores(model, task, path="inputs", steps=2),
        attribution_edge_scores(model, task, path="activations", steps=1),
        attribution_edge_scores(model, task, path="clean-corrupted"),
        secant_edge_scores(model, task),
    ):
        np.testing.assert_allclose(scores.values, exact, atol=1e-6, err_msg=scores.attrs["method"])
    assert np.nansum(exact[:, -1]) == pytest.approx(1, abs=1e-6)


def test_integrated_gradients_become_complete():
    """All that flows out of the embedding, along its own path, is the metric's difference."""
    model, task = tiny_model("llama"), tiny_task()
    gaps = [
        abs(float(np.nansum(attribution_edge_scores(model, task, path="inputs", steps=steps).values[0])) - 1)
        for steps in (1, 4, 32)
    ]
    assert gaps[2] < gaps[1] < gaps[0]
    assert gaps[2] < 1e-2


def test_gradients_of_both_runs_are_averaged():
    model, task = tiny_model("llama"), tiny_task()
    noise, denoise = (attribution_edge_scores(model, task, direction=one) for one in ("noise", "denoise"))
    both = attribution_edge_scores(model, task, path="clean-corrupted")
    np.testing.assert_allclose(both.values, (noise.values + denoise.values) / 2, atol=1e-9)


def test_bad_choices_are_refused():
    model, task = tiny_model("gpt2"), tiny_task()
    with pytest.raises(ValueError, match="path='along'"):
        attribution_edge_scores(model, task, path="along")
    with pytest.raises(ValueError, match="steps=0"):
        attribution_edge_scores(model, task, steps=0)
    with pytest.raises(ValueError, match="has no gradient"):
        attribution_edge_scores(model, task, metric="accuracy")
    with pytest.raises(interp.model.SiteUnavailable, match="norms the stream"):
        attribution_edge_scores(tiny_model("bert"), task)
