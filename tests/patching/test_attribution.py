"""Attribution patching and its baselines: exact on a linear model, and formulas written out."""

import numpy as np
import pytest
import torch

import interp
from interp import Edit
from interp.metrics import logit_diff
from interp.patching import activation_patching
from interp.patching.attribution import attribution_patching, gradient_times_input, normgrad
from tests.model.families import FAMILIES
from tests.patching.linear_model import linear_model, pairs_of_tokens

SITES = [
    ("embed", ("position",)),
    ("resid_pre", ("layer", "position")),
    ("resid_mid", ("layer",)),
    ("v", ("layer", "position", "head")),
    ("z", ("layer", "head")),
    ("result", ("layer", "position", "head")),
    ("attn_out", ("layer", "position")),
    ("mlp_pre", ("layer", "neuron")),
    ("mlp_post", ("layer", "position", "neuron")),
    ("mlp_out", ("layer", "position")),
    ("ln_final", ()),
]


def tiny(name):
    return interp.load(FAMILIES[name].make_model("eager", torch.float64))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize(("site", "by"), SITES)
def test_attribution_patching_is_exact_on_a_linear_model(site, by, direction):
    model, task = linear_model(), pairs_of_tokens()
    options = {"site": site, "by": by, "direction": direction, "per_prompt": True}
    exact = activation_patching(model, task, **options)
    assert float(abs(exact).max()) > 1e-3
    np.testing.assert_allclose(attribution_patching(model, task, **options), exact, atol=1e-10)


@pytest.mark.parametrize(("site", "by"), SITES)
def test_gradient_times_input_is_exact_for_zero_ablation_of_a_linear_model(site, by):
    model, task = linear_model(), pairs_of_tokens()
    exact = activation_patching(model, task, site=site, by=by, direction="noise", ablation="zero")
    assert float(abs(exact).max()) > 1e-3
    for direction in ("noise", "denoise"):
        found = gradient_times_input(model, task, site=site, by=by, direction=direction)
        np.testing.assert_allclose(found, exact, atol=1e-10)


def test_where_the_runs_agree_attribution_is_exactly_zero():
    model, task = tiny("llama"), pairs_of_tokens()
    for site in ("resid_pre", "z", "k", "mlp_out"):
        found = attribution_patching(model, task, site=site)
        assert not found.isel(position=slice(0, 2)).values.any()
        assert found.isel(position=2).values.any()


def test_masked_scores_count_nothing():
    model, task = tiny("llama"), pairs_of_tokens()
    by = ("layer", "head", "query", "key")
    for estimate in (attribution_patching, gradient_times_input, normgrad):
        found = estimate(model, task, site="attn_scores", by=by).values
        above = np.triu(np.ones(found.shape[-2:], dtype=bool), k=1)
        assert not found[..., above].any()
        assert np.isfinite(found).all()
        assert found[..., ~above].any()


@pytest.mark.parametrize(
    ("site", "by", "features", "summed"),
    [
        ("resid_pre", ("layer", "position"), (2,), ()),
        ("resid_pre", ("layer",), (2,), (1,)),
        ("z", ("layer", "position", "head"), (3,), ()),
        ("z", ("layer", "head"), (3,), (1,)),
        ("z", ("layer",), (3,), (1, 2)),
        ("result", ("layer", "head"), (3,), (1,)),
        ("mlp_post", ("layer", "position"), (2,), ()),
        ("mlp_post", ("layer", "neuron"), (), (1,)),
        ("pattern", ("layer", "head"), (), (2, 3)),
    ],
)
def test_normgrad_multiplies_norms_over_the_features_of_a_position_and_head(site, by, features, summed):
    model, task = tiny("llama"), pairs_of_tokens()
    found = normgrad(model, task, site=site, by=by, normalised=False, per_prompt=True)
    _, activations, gradients = model.run_with_gradients(
        task.clean, lambda logits: logit_diff(logits[:, -1], task.answers, task.wrong), site
    )
    one = model.site_names(site)[1]
    activation, gradient = activations[one].numpy(), gradients[one].numpy()
    norms = [np.sqrt((x**2).sum(features)) if features else np.abs(x) for x in (activation, gradient)]
    # Axes that are summed come before those that the norm took away.
    expected = (norms[0] * norms[1]).sum(summed) if summed else norms[0] * norms[1]
    np.testing.assert_allclose(found.isel(layer=1), expected, rtol=1e-6)
    assert found.attrs["unsigned"] == 1


def test_unsigned_scores_stay_positive_when_the_gap_is_negative():
    model, task = tiny("llama"), pairs_of_tokens()
    swapped = interp.tasks.Task(**{**vars(task), "answers": task.wrong, "wrong": task.answers})
    for one in (task, swapped):
        assert bool((normgrad(model, one, site="z") >= 0).all())
    np.testing.assert_allclose(
        attribution_patching(model, task, site="z"), attribution_patching(model, swapped, site="z"), atol=1e-10
    )


def test_a_baseline_is_of_the_clean_run_and_says_what_it_is_held_against():
    model, task = tiny("gpt2"), pairs_of_tokens()
    both = [gradient_times_input(model, task, site="z", direction=one) for one in ("denoise", "noise")]
    np.testing.assert_array_equal(*both)
    assert [one.attrs["direction"] for one in both] == ["denoise", "noise"]
    same_clean = task[:]
    other = interp.tasks.Task(**{**vars(same_clean), "corrupted_ids": same_clean.corrupted_ids[::-1]})
    changed = gradient_times_input(model, other, site="z", normalised=False)
    np.testing.assert_array_equal(gradient_times_input(model, task, site="z", normalised=False), changed)


def test_the_model_is_left_as_it_was():
    model, task = tiny("llama"), pairs_of_tokens()
    before = model(task.clean)
    attribution_patching(model, task, site="pattern", by=("layer", "head"))
    assert torch.equal(model(task.clean), before)
    assert all(parameter.grad is None for parameter in model.hf.parameters())
    with model.edited(Edit("z", value=0.0)):
        assert not torch.equal(model(task.clean), before)
