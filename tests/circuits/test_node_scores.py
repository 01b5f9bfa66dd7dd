"""Node scores against the patching functions that they come from, finite differences, and each other."""

import numpy as np
import pytest
import torch

import interp
from interp.circuits.node_scores import (
    attribution_node_scores,
    exact_node_scores,
    hisp_scores,
    random_node_scores,
)
from interp.metrics import logit_diff
from interp.model import Edit, Site
from interp.patching import METHODS, activation_patching
from tests.model.families import FAMILIES
from tests.patching.linear_model import linear_model, pairs_of_tokens


def tiny(name="llama"):
    return interp.load(FAMILIES[name].make_model("eager", torch.float64))


def expected_names(model):
    names = ["embed"]
    for layer in range(model.n_layers):
        names += [f"L{layer}H{head}" for head in range(model.n_heads)] + [f"mlp{layer}"]
    return names


@pytest.mark.parametrize("method", METHODS)
def test_estimates_are_those_of_the_method_called_directly(method):
    model, task = tiny(), pairs_of_tokens()
    found = attribution_node_scores(model, task, method=method, progress=False)
    assert found.dims == ("node",)
    assert found["node"].values.tolist() == expected_names(model)
    options = {"direction": "noise", "progress": False}
    heads = METHODS[method](model, task, site="z", by=("layer", "head"), **options)
    mlps = METHODS[method](model, task, site="mlp_out", by=("layer",), **options)
    embed = METHODS[method](model, task, site="embed", by=(), **options)
    np.testing.assert_allclose(found.sel(node="embed"), embed, rtol=1e-5, atol=1e-7)
    for layer in range(model.n_layers):
        names = [f"L{layer}H{head}" for head in range(model.n_heads)]
        np.testing.assert_allclose(found.sel(node=names), heads.sel(layer=layer), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.sel(node=f"mlp{layer}"), mlps.sel(layer=layer), rtol=1e-5, atol=1e-7)
    assert found.attrs["method"] == method
    assert found.attrs["unsigned"] == heads.attrs["unsigned"]
    assert found.attrs["metric"] == "logit_diff"
    assert found.attrs["direction"] == "noise"
    assert not {"site", "completeness_gap"} & set(found.attrs)


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_estimates_are_exact_on_a_linear_model(direction):
    model, task = linear_model(), pairs_of_tokens()
    exact = exact_node_scores(model, task, direction=direction, progress=False)
    found = attribution_node_scores(model, task, method="atp", direction=direction, progress=False)
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-6)
    assert float(exact.sel(node="embed")) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"direction": "denoise", "metric": "log_prob"}, {"ablation": "mean"}])
def test_exact_scores_are_activation_patching(options):
    model, task = tiny("gpt2"), pairs_of_tokens()
    found = exact_node_scores(model, task, progress=False, **options)
    options = {"direction": "noise", "progress": False, "reference": True} | options
    heads = activation_patching(model, task, site="z", by=("layer", "head"), **options)
    mlps = activation_patching(model, task, site="mlp_out", by=("layer",), **options)
    embed = activation_patching(model, task, site="embed", by=(), **options)
    expected = [float(embed)]
    for layer in range(model.n_layers):
        expected += [*heads.sel(layer=layer).values, float(mlps.sel(layer=layer))]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert found["node"].values.tolist() == expected_names(model)


def gate_slope(model, task, site, head, ablation):
    """|∂m/∂ξ| of each clean prompt by central differences, where ξ mixes an activation with its replacement."""
    _, clean = model.run_with_cache(task.clean, [site])
    _, corrupted = model.run_with_cache(task.corrupted, [site])
    other = corrupted[site] if ablation == "resample" else torch.zeros_like(clean[site])
    # Llama's norms compute in float32: a smaller step would measure their rounding.
    step, values = 3e-3, []
    for gate in (1 + step, 1 - step):
        mixed = gate * clean[site] + (1 - gate) * other
        with model.edited([Edit(site, value=mixed, heads=head)]):
            values.append(logit_diff(model(task.clean)[:, -1], task.answers, task.wrong))
    return ((values[0] - values[1]) / (2 * step)).abs().sum()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("ablation", ["resample", "zero"])
def test_hisp_is_the_slope_of_gates(name, ablation):
    model, task = tiny(name), pairs_of_tokens()
    found = hisp_scores(model, task, ablation=ablation, batch_size=2, progress=False)
    assert np.isnan(found.sel(node="embed"))
    assert found.attrs["unsigned"] == 1
    for layer in range(model.n_layers):
        slopes = {
            kind: torch.stack(
                [gate_slope(model, task, Site(kind, layer), [head], ablation) for head in range(model.n_heads_at(kind))]
            )
            for kind in "qkv"
        }
        mlp = gate_slope(model, task, Site("mlp_out", layer), None, ablation)
        norm = torch.cat([*slopes.values(), mlp[None]]).norm()
        for head in range(model.n_heads):
            shared = head * model.n_kv_heads // model.n_heads
            expected = max(slopes["q"][head], slopes["k"][shared], slopes["v"][shared]) / norm
            assert float(found.sel(node=f"L{layer}H{head}")) == pytest.approx(float(expected), rel=1e-3, abs=2e-4)
        assert float(found.sel(node=f"mlp{layer}")) == pytest.approx(float(mlp / norm), rel=1e-3)


def test_hisp_of_a_layer_without_effect_is_zero():
    model, task = linear_model(), pairs_of_tokens()
    with torch.no_grad():
        last = model.hf.transformer.h[2]
        last.attn.c_proj.weight.zero_()
        last.mlp.c_proj.weight.zero_()
    found = hisp_scores(model, task, progress=False)
    assert float(abs(found.sel(node=["L2H0", "mlp2"])).max()) == 0
    assert float(found.sel(node="mlp1")) > 0


def test_random_scores_are_seeded():
    model = tiny()
    one, again, other = (random_node_scores(model, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert bool((one != other).any())
    assert one["node"].values.tolist() == expected_names(model)
    assert not bool(one.isnull().any())


def test_bad_input_is_refused_before_any_run(monkeypatch):
    model, task = tiny(), pairs_of_tokens()
    monkeypatch.setattr(model, "_forward", None)
    with pytest.raises(ValueError, match="'rel' is not an estimate"):
        attribution_node_scores(model, task, method="rel")
    with pytest.raises(ValueError, match="ablation='mean'; it is one of resample, zero"):
        hisp_scores(model, task, ablation="mean")
    with pytest.raises(ValueError, match="norms the stream after every addition"):
        exact_node_scores(interp.load(FAMILIES["bert"].make_model("eager")), task)
