"""Circuit runs and the numbers made of them, against hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from interp.circuits.circuit import Circuit
from interp.circuits.edge_scores import attribution_edge_scores
from interp.circuits.evaluate import areas, evaluate, measured, run_circuits
from interp.circuits.graph import Graph
from interp.metrics import logit_diff
from interp.model import Edit
from interp.tasks import Task
from tests.circuits.tiny import tiny_model, tiny_task

READ = {"metric": lambda logits, prompts: logit_diff(logits, prompts.answers, prompts.wrong)}


def metric_of(model, tokens, task, edits=()):
    with model.edited(list(edits)):
        return logit_diff(model(tokens, logits_to_keep=1)[:, -1], task.answers, task.wrong)


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_a_node_cut_from_everything_is_a_node_ablated(ablation):
    """All edges out of a head and an MLP cut: the same as plain hooks that replace z and mlp_out."""
    model, task = tiny_model("llama"), tiny_task(n=3)
    graph = Graph.of(model)
    mask = graph.exists.copy()
    mask[[graph.head(1, 2), graph.mlp(0)]] = False
    found = run_circuits(model, task, graph, mask[None], READ, ablation=ablation)["metric"][0]
    _, source = model.run_with_cache(task.corrupted if ablation == "resample" else task.clean, ["z", "mlp_out"])
    values = {site: source[site, layer] for site, layer in (("z", 1), ("mlp_out", 0))}
    if ablation != "resample":
        values = {
            site: value.mean((0, 1), keepdim=True).expand(value.shape) * (ablation == "mean")
            for site, value in values.items()
        }
    edits = [
        Edit("blocks.1.attn.hook_z", heads=[2], value=values["z"]),
        Edit("blocks.0.hook_mlp_out", value=values["mlp_out"]),
    ]
    expected = metric_of(model, task.clean, task, edits)
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-6, rtol=0)
    assert (expected - metric_of(model, task.clean, task)).abs().max() > 1e-3


def test_constants_are_what_cut_edges_carry():
    model, task = tiny_model("llama"), tiny_task()
    graph = Graph.of(model)
    constants = torch.randn(len(graph.writers), model.d_model, generator=torch.Generator().manual_seed(0))
    mask = graph.exists.copy()
    mask[graph.mlp(1)] = False
    found = run_circuits(model, task, graph, mask[None], READ, constants=constants)["metric"][0]
    value = constants[graph.mlp(1)].double().expand(2, 7, -1)
    expected = metric_of(model, task.clean, task, [Edit("blocks.1.hook_mlp_out", value=value)])
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


def test_prompts_of_several_lengths_come_back_in_order():
    model, long = tiny_model("llama"), tiny_task(n=2)
    short = {name: getattr(long, name) for name in ("clean_ids", "corrupted_ids", "str_tokens", "corrupted_str_tokens")}
    task = Task(
        **{
            **{name: getattr(long, name) for name in ("name", "answers", "wrong", "metric", "clean_text", "index")},
            "corrupted_text": long.corrupted_text,
            "positions": {"END": torch.tensor([5, 6])},
            **{name: (rows[0][1:], rows[1]) for name, rows in short.items()},
        }
    )
    graph = Graph.of(model)
    found = run_circuits(model, task, graph, graph.exists[None], READ)["metric"][0]
    expected = [float(metric_of(model, torch.tensor([ids]), task[row])) for row, ids in enumerate(task.clean_ids)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_curve_runs_from_nothing_to_everything():
    model, task = tiny_model("llama"), tiny_task(n=3)
    scores = attribution_edge_scores(model, task)
    circuit = Circuit.from_scores(Graph.of(model), scores, np.zeros(scores.shape, dtype=bool))
    curve = evaluate(model, task, circuit, sizes=(0, 0.1, 0.5, 1))
    assert curve["n_edges"].values.tolist() == [[0, 19, 95, 190]] * 2
    for ranking in ("magnitude", "signed"):
        one = curve.sel(ranking=ranking)
        np.testing.assert_allclose(one["faithfulness"][[0, -1]], [0, 1], atol=1e-6)
        assert float(one["kl"][-1]) == pytest.approx(0, abs=1e-6)
        assert float(one["kl"][0]) > 1e-3
    # One point of it by hand.
    mask = circuit.select(edges=19, signed=True, prune=False).mask
    values = run_circuits(model, task, circuit.graph, np.stack([circuit.graph.exists, mask & False, mask]), READ)
    whole, nothing, some = values["metric"].double().mean(1)
    expected = float((some - nothing) / (whole - nothing))
    assert float(curve["faithfulness"].sel(ranking="signed", size=0.1)) == pytest.approx(expected, abs=1e-6)
    own = evaluate(model, task, circuit.select(edges=19, signed=True, prune=False), sizes=(1,))
    assert float(own["circuit_faithfulness"]) == pytest.approx(expected, abs=1e-6)
    assert float(own["circuit_metric"]) == pytest.approx(float(some), abs=1e-6)


def test_areas_by_hand():
    curve = xr.DataArray(
        [[0.0, 0.5, 1.0], [0.0, 2.0, 1.0]],
        dims=("ranking", "size"),
        coords={"ranking": ["magnitude", "signed"], "size": [0.0, 0.5, 1.0]},
    )
    cpr, cmd = areas(curve)
    assert cpr == pytest.approx(0.5 * (0 + 2) / 2 + 0.5 * (2 + 1) / 2)
    assert cmd == pytest.approx(0.5 * (1 + 0.5) / 2 + 0.5 * (0.5 + 0) / 2)


def test_kl_and_accuracy_are_those_of_the_circuit():
    model, task = tiny_model("llama"), tiny_task(n=4)
    graph = Graph.of(model)
    values, said = measured(model, task, graph, [graph.exists & False])
    full, empty = (model(tokens, logits_to_keep=1)[:, -1].float() for tokens in (task.clean, task.corrupted))
    kl = torch.nn.functional.kl_div(empty.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="none")
    torch.testing.assert_close(values["kl"][0], kl.sum(-1), atol=1e-5, rtol=0)
    right = empty.gather(1, task.answers) > empty.gather(1, task.wrong)
    assert values["accuracy"][0].tolist() == right[:, 0].float().tolist()
    assert said["metric_empty"] == pytest.approx(float(metric_of(model, task.corrupted, task).mean()), abs=1e-6)


def test_bad_choices_are_refused():
    model, task = tiny_model("llama"), tiny_task()
    graph = Graph.of(model)
    with pytest.raises(ValueError, match="ablation='noise'"):
        run_circuits(model, task, graph, graph.exists[None], READ, ablation="noise")
    circuit = Circuit(graph, np.where(graph.exists, 1.0, np.nan), graph.exists.copy())
    with pytest.raises(ValueError, match="shares of all edges"):
        evaluate(model, task, circuit, sizes=(0.5, 20))
