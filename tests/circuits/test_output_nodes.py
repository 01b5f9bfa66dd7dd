"""Output nodes: effects are those of activation and path patching, and of plain hooks; a wired model's are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import interp
from interp import Edit, zoo
from interp.circuits.output_nodes import _random_sets, joint_output_effects, output_nodes
from interp.metrics import logit_diff
from interp.patching import activation_patching, edge_effects, path_patching
from tests.circuits.choices import choice_task, joined
from tests.model.families import FAMILIES
from tests.patching.tokens_task import task_of_tokens

NODES = ["L0H1", "L1H2", "mlp1", "L1H0"]


@pytest.fixture(scope="module")
def llama():
    return interp.load(FAMILIES["llama"].make_model("sdpa"))


@pytest.fixture(scope="module")
def task(llama):
    return choice_task(llama, n=2)


def test_output_nodes_are_total_and_direct_effects(llama, task):
    found = output_nodes(llama, task)
    for name, method, more in (
        ("total", activation_patching, {}),
        ("direct", path_patching, {"readers": "logits"}),
    ):
        heads = method(llama, task, site="z", by=("layer", "head"), direction="noise", **more)
        mlps = method(llama, task, site="mlp_out", by=("layer",), direction="noise", **more)
        for layer in range(llama.n_layers):
            assert float(found[name].sel(node=f"mlp{layer}")) == pytest.approx(float(mlps[layer]), abs=1e-6)
            for head in range(llama.n_heads):
                value = float(found[name].sel(node=f"L{layer}H{head}"))
                assert value == pytest.approx(float(heads[layer, head]), abs=1e-6)
    np.testing.assert_allclose(found["indirect"], found["total"] - found["direct"], atol=1e-6)
    # Nothing comes after the last MLP, so that all its effect is direct.
    assert abs(float(found["indirect"].sel(node=f"mlp{llama.n_layers - 1}"))) < 1e-5


def test_of_a_wired_model_only_the_mover_writes_the_answer():
    found = output_nodes(zoo.load("duplicate"), zoo.task("duplicate", n=4))
    for node in found["node"].values:
        total, direct = float(node in ("L0H1", "L1H2", "L2H0")), float(node == "L2H0")
        assert float(found["total"].sel(node=node)) == pytest.approx(total, abs=0.02), node
        assert float(found["direct"].sel(node=node)) == pytest.approx(direct, abs=0.02), node


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_joint_total_is_a_run_with_all_nodes_replaced(llama, task, direction):
    found = joint_output_effects(llama, task, NODES, n_random=0, direction=direction)
    base, other = (task.corrupted, task.clean) if direction == "denoise" else (task.clean, task.corrupted)
    _, cache = llama.run_with_cache(other)
    edits = [
        Edit("blocks.0.attn.hook_z", heads=[1], value=cache["z", 0]),
        Edit("blocks.1.attn.hook_z", heads=[0, 2], value=cache["z", 1]),
        Edit("blocks.1.hook_mlp_out", value=cache["mlp_out", 1]),
    ]

    def metric(tokens):
        return float(logit_diff(llama(tokens)[:, -1], task.answers, task.wrong).mean())

    gap = metric(other) - metric(base)
    with llama.edited(edits):
        together = metric(base)
    with llama.edited(edits[0]):
        alone = metric(base)
    assert float(found["total"]) == pytest.approx((together - metric(base)) / gap, abs=1e-4)
    assert float(found["single_total"].sel(node="L0H1")) == pytest.approx((alone - metric(base)) / gap, abs=1e-4)
    assert abs(together - metric(base)) > 1e-4
    assert abs(float(found["total"]) - float(found["single_total"].sum())) > 1e-4  # no sum of single effects


def test_joint_direct_is_path_patching_of_all_nodes_into_the_logits(llama, task):
    found = joint_output_effects(llama, task, NODES, n_random=0)
    own = edge_effects(llama, task, [[(node, "logits") for node in NODES], *([(node, "logits")] for node in NODES)])
    assert float(found["direct"]) == pytest.approx(float(own[0]), abs=1e-6)
    np.testing.assert_allclose(found["single_direct"], own[1:], atol=1e-6)


def test_single_effects_are_those_of_output_nodes(llama, task):
    nodes = output_nodes(llama, task)
    found = joint_output_effects(llama, task, NODES, n_random=0, direction="noise", batch_size=2)
    for name in ("total", "direct"):
        np.testing.assert_allclose(found[f"single_{name}"], nodes[name].sel(node=NODES), atol=1e-5)


def test_all_nodes_together_are_the_other_run_but_for_the_embedding(llama, task):
    everything = output_nodes(llama, task)["node"].values.tolist()
    found = joint_output_effects(llama, task, everything, n_random=2)
    # The last token's embedding is the same in both prompts, so that nothing else tells the logits apart.
    assert bool((task.clean[:, -1] == task.corrupted[:, -1]).all())
    assert float(found["total"]) == pytest.approx(1, abs=1e-4)
    assert float(found["direct"]) == pytest.approx(1, abs=1e-4)
    # A random set of all nodes is all nodes: as good, so that nothing speaks for the chosen ones.
    np.testing.assert_allclose(found["random_total"], 1, atol=1e-4)
    assert found.attrs["p_total"] == 1


def test_the_mover_beats_random_heads_and_draws_reproduce():
    model, task = zoo.load("duplicate"), zoo.task("duplicate", n=2)
    found = joint_output_effects(model, task, ["L2H0"], n_random=20)
    assert float(found["direct"]) == pytest.approx(1, abs=0.01)
    is_mover = np.abs(found["random_direct"] - 1) < 0.01
    assert found.attrs["p_direct"] == pytest.approx((1 + int(is_mover.sum())) / 21)
    assert 0 < int(is_mover.sum()) < 10  # one of nine heads
    assert bool((np.abs(found["random_direct"].where(~is_mover, 0)) < 0.01).all())
    again = joint_output_effects(model, task, ["L2H0"], n_random=20)
    np.testing.assert_array_equal(found["random_total"], again["random_total"])
    other = joint_output_effects(model, task, ["L2H0"], n_random=20, seed=1)
    assert not np.array_equal(found["random_total"], other["random_total"])


def test_random_sets_have_as_many_heads_and_mlps():
    model = zoo.load("ioi_small")
    for drawn in _random_sets(model, ("L0H1", "L2H2", "mlp1"), 10, seed=0):
        assert len(set(drawn)) == 3
        assert sum(node.startswith("mlp") for node in drawn) == 1


def test_joint_effects_refuse_before_any_run(llama, task):
    for nodes, more, message in (
        ([], {}, "give a list"),
        ("L0H0", {}, "give a list"),
        (["L9H9"], {}, "is not a head or MLP"),
        (["embed"], {}, "is not a head or MLP"),
        (["L0H0", "L0H0"], {}, "named twice"),
        (["L0H0"], {"direction": "up"}, "one of denoise, noise"),
        (["L0H0"], {"n_random": -1}, "0 or more"),
        (["L0H0"], {"metric": "logits"}, "is not a metric"),
    ):
        with pytest.raises(ValueError, match=message):
            joint_output_effects(llama, task, nodes, **more)


def test_prompts_of_several_lengths_are_measured_together(llama, task):
    other = choice_task(llama, n=2, seed=3)
    tokens = (torch.cat([one, other.clean[:, :2]], dim=1) for one in (other.clean, other.corrupted))
    longer = replace(task_of_tokens(*tokens), answers=other.answers, wrong=other.wrong)
    shorter = replace(task, positions={"END": task.positions["END"]})
    alone = [joint_output_effects(llama, one, NODES, n_random=0) for one in (shorter, longer)]
    found = joint_output_effects(llama, joined(shorter, longer), NODES, n_random=0)
    gaps = [one.attrs["metric_clean"] - one.attrs["metric_corrupted"] for one in alone]
    for name in ("total", "direct"):
        expected = sum(float(one[name]) * gap for one, gap in zip(alone, gaps, strict=True)) / sum(gaps)
        assert float(found[name]) == pytest.approx(expected, abs=1e-4)
