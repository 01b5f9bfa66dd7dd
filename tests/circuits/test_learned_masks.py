"""Learned masks on models in which it is known what matters, and what such training must leave alone."""

import numpy as np
import pytest
import torch

import interp
from interp.circuits import learned_masks
from interp.circuits.edge_scores import attribution_edge_scores
from interp.circuits.evaluate import measured
from interp.circuits.graph import Graph
from interp.circuits.learned_masks import edge_pruning_scores, subnetwork_probing_scores
from interp.circuits.selection import top_edges
from interp.metrics import kl_divergence
from tests.model.families import FAMILIES
from tests.patching.linear_model import pairs_of_tokens


def tiny(name="llama", dtype=torch.float32):
    return interp.load(FAMILIES[name].make_model("sdpa", dtype))


@pytest.fixture(scope="module")
def one_head():
    """A model in which L1H2 alone writes to the stream: W_O of all other heads and all MLPs are zero.

    Clean and corrupted prompts differ before the last token, so that nothing reaches the logits but by
    embed → L1H2.k, embed → L1H2.v and L1H2 → logits.
    """
    model = tiny("gpt2")
    with torch.no_grad():
        for layer, block in enumerate(model.hf.transformer.h):
            for module in (block.mlp.c_proj, block.attn.c_proj):
                module.bias.zero_()
            block.mlp.c_proj.weight.zero_()
            W_O = block.attn.c_proj.weight.view(4, 8, 32)
            W_O *= 20 * torch.tensor([layer == 1 and head == 2 for head in range(4)])[:, None, None]
    return model


FAST = {"steps": 100, "learning_rate": 0.2}
"""Half the steps, each twice as large."""
PATH = [("embed", "L1H2.k"), ("embed", "L1H2.v"), ("L1H2", "logits")]


def test_gates_of_dead_nodes_close_and_that_of_the_live_one_stays_open(one_head):
    scores = subnetwork_probing_scores(one_head, pairs_of_tokens(8), **FAST)
    assert scores.dims == ("node",)
    assert scores["node"].values.tolist() == list(Graph.of(one_head).writers)
    is_live = scores["node"].isin(["embed", "L1H2"])
    assert float(scores[is_live].min()) > 0.95
    assert float(scores[~is_live].max()) < 0.05
    assert scores.attrs["n_open"] == 1
    assert scores.attrs["kl"] < 1e-6


def test_the_penalty_is_what_a_node_must_be_worth(one_head):
    """The only live head is worth the divergence of corrupted predictions: so much is paid, ten times is not."""
    task = pairs_of_tokens(8)
    worth = float(kl_divergence(one_head(task.clean)[:, -1], one_head(task.corrupted)[:, -1]).mean())
    cheap, dear = (subnetwork_probing_scores(one_head, task, penalty=share * worth, **FAST) for share in (1.0, 10.0))
    assert float(cheap.sel(node="L1H2")) > 0.9
    assert float(dear.sel(node="L1H2")) < 0.1
    assert dear.attrs["n_open"] == 0
    assert dear.attrs["kl"] == pytest.approx(worth, rel=1e-4)


def test_gates_of_edges_off_the_path_close(one_head):
    graph, sparsity = Graph.of(one_head), 0.9
    scores = edge_pruning_scores(one_head, pairs_of_tokens(8), sparsity=sparsity, steps=150, learning_rate=0.2)
    assert scores.dims == ("writer", "reader")
    np.testing.assert_array_equal(np.isfinite(scores), graph.exists)
    best = top_edges(graph, scores.values, len(PATH))
    assert {(graph.writers[writer], graph.readers[reader]) for writer, reader in np.argwhere(best)} == set(PATH)
    assert float(scores.values[best].min()) > 0.95
    assert scores.attrs["n_open"] == len(PATH)
    assert scores.attrs["kl"] < 1e-6
    # The constraint is on expected numbers: the sum of all probabilities is what the target leaves.
    assert float(scores.sum()) == pytest.approx((1 - sparsity) * graph.n_edges, rel=0.2)


def test_a_pruned_circuit_of_a_model_where_everything_matters():
    """As sparse as asked, and nearer to the model than the same number of edges by EAP-IG or at random."""
    model, task = tiny(), pairs_of_tokens(16)
    graph, sparsity = Graph.of(model), 0.8
    scores = edge_pruning_scores(model, task, sparsity=sparsity, steps=200, learning_rate=0.15)
    n_edges = round((1 - sparsity) * graph.n_edges)
    others = [
        attribution_edge_scores(model, task, path="inputs").values,
        *np.where(graph.exists, np.random.default_rng(0).random((5, *graph.exists.shape)), np.nan),
    ]
    masks = [scores.values >= 0.5, *(top_edges(graph, one, n_edges) for one in (scores.values, *others))]
    learned, best, estimated, *random = measured(model, task, graph, masks)[0]["kl"].mean(1).tolist()
    assert int(masks[0].sum()) == pytest.approx(n_edges, rel=0.2)
    assert best < 0.8 * estimated
    assert best < 0.6 * min(random)
    assert learned == pytest.approx(scores.attrs["kl"], rel=0.2)


def test_the_multiplier_alone_brings_edges_to_close(one_head, monkeypatch):
    """Without the squared miss, what closes gates is the multiplier, which grows while too few are closed."""
    monkeypatch.setattr(learned_masks, "FIRMNESS", 0.0)
    scores = edge_pruning_scores(one_head, pairs_of_tokens(8), sparsity=0.9, steps=60, learning_rate=0.2)
    assert float(scores.mean()) < 0.5


@pytest.mark.parametrize("method", [subnetwork_probing_scores, edge_pruning_scores])
def test_seeds_attributes_and_a_model_left_as_found(method):
    model, task = tiny(), pairs_of_tokens(5)
    before = {name: (one.clone(), one.requires_grad) for name, one in model.hf.named_parameters()}
    state = torch.random.get_rng_state()
    with torch.no_grad():
        one, again, other = (method(model, task, steps=4, seed=seed, batch_size=2) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other, equal_nan=True)
    assert torch.equal(state, torch.random.get_rng_state())
    for name, parameter in model.hf.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
    assert {"metric": "kl", "steps": 4, "training_seed": 0, "n_prompts": 5}.items() <= one.attrs.items()
    assert one.attrs["method"] in ("subnetwork-probing", "edge-pruning")
    assert float(one.max()) <= 1
    assert float(one.min()) > 0


@pytest.mark.parametrize("name", ["falcon", "gemma2"])
def test_other_families(name):
    """Parallel blocks; norms behind attention; grouped keys and values."""
    model = interp.load(FAMILIES[name].make_model("eager", torch.float32))
    for method in (subnetwork_probing_scores, edge_pruning_scores):
        assert method(model, pairs_of_tokens(4), steps=3).attrs["kl"] >= -1e-6


def test_bad_input_is_refused_before_any_run(monkeypatch):
    model, task = tiny(), pairs_of_tokens()
    monkeypatch.setattr(model, "_forward", None)
    for method, choices, message in [
        (subnetwork_probing_scores, {"penalty": -1.0}, "penalty=-1.0; it is 0 or greater"),
        (subnetwork_probing_scores, {"steps": 0}, "steps=0; it is greater than 0"),
        (edge_pruning_scores, {"learning_rate": 0.0}, "learning_rate=0.0; it is greater than 0"),
        (edge_pruning_scores, {"sparsity": 1.0}, "sparsity=1.0; it is the share of edges to be cut"),
        (edge_pruning_scores, {"batch_size": 0}, "batch_size=0; it is at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            method(model, task, **choices)


def test_a_model_without_the_behaviour_is_refused(one_head):
    """Where the only live head is cut off, clean and corrupted predictions are the same."""
    model = tiny("gpt2")
    model.hf.load_state_dict(one_head.hf.state_dict())
    with torch.no_grad():
        model.hf.transformer.h[1].attn.c_proj.weight.zero_()
    with pytest.raises(ValueError, match="every edge cut predicts what the model does"):
        edge_pruning_scores(model, pairs_of_tokens(), steps=3)
