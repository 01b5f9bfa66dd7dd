"""Integrated gradients: completeness, exactness on a linear model, and both paths written out by hand."""

import numpy as np
import pytest
import torch
from scipy import integrate

import interp
from interp import Edit
from interp.metrics import logit_diff
from interp.patching import activation_patching
from interp.patching.attribution import attribution_patching
from interp.patching.integrated import RULES, integrated_gradients, integrated_scores, rule_points
from tests.model.families import FAMILIES
from tests.patching.linear_model import linear_model, pairs_of_tokens


def tiny(name="gpt2"):
    return interp.load(FAMILIES[name].make_model("eager", torch.float64))


@pytest.mark.parametrize("rule", RULES)
def test_rules_integrate_what_they_should(rule):
    points = rule_points(4, rule)
    assert abs(sum(weight for _, weight in points) - 1) < 1e-14
    exact_degree = {"left": 0, "right": 0, "midpoint": 1, "gauss-legendre": 7}[rule]
    for degree in range(exact_degree + 2):
        error = sum(weight * place**degree for place, weight in points) - 1 / (degree + 1)
        assert (abs(error) < 1e-14) == (degree <= exact_degree)
    many = sum(weight * np.exp(place) for place, weight in rule_points(2000, rule))
    assert abs(many - integrate.quad(np.exp, 0, 1)[0]) < 1e-3


@pytest.mark.parametrize("path", ["embedding", "activation"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_integrated_gradients_of_a_linear_model_are_exact_in_one_step(path, direction):
    model, task = linear_model(), pairs_of_tokens()
    for site, by in [("embed", ("position",)), ("z", ("layer", "head")), ("mlp_post", ("layer", "neuron"))]:
        options = {"site": site, "by": by, "direction": direction, "per_prompt": True}
        found = integrated_gradients(model, task, steps=1, path=path, **options)
        np.testing.assert_allclose(found, activation_patching(model, task, **options), atol=1e-10)
        assert found.attrs["completeness_gap"] < 1e-10


@pytest.mark.parametrize("path", ["embedding", "activation"])
@pytest.mark.parametrize("rule", RULES)
def test_the_completeness_gap_shrinks_as_steps_grow(path, rule):
    model, task = tiny(), pairs_of_tokens()
    site, by = ("embed", ("position",)) if path == "embedding" else ("attn_out", ("layer", "position"))
    gaps = [
        integrated_gradients(model, task, site=site, by=by, steps=steps, rule=rule, path=path).attrs["completeness_gap"]
        for steps in (2, 8, 32)
    ]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < (0.05 if rule in ("left", "right") else 1e-3)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_scores_on_the_activation_path_add_up_to_the_exact_effect_of_the_whole_site(direction):
    model, task = tiny(), pairs_of_tokens()
    options = {"direction": direction, "normalised": False, "per_prompt": True}
    for site in ("resid_mid", "attn_scores", "k", "mlp_pre"):
        whole = activation_patching(model, task, site=site, by=("layer",), **options)
        found = integrated_gradients(
            model, task, site=site, by=("layer",), steps=24, rule="gauss-legendre", path="activation", **options
        )
        np.testing.assert_allclose(found, whole, atol=1e-4)
    across = integrated_gradients(model, task, site="mlp_pre", by=(), steps=24, path="activation", **options)
    np.testing.assert_allclose(across, found.sum("layer"), atol=1e-2)


def test_the_embedding_path_by_hand():
    model, task = tiny("llama"), pairs_of_tokens()
    sites = ["hook_embed", *model.site_names("z")]
    _, clean = model.run_with_cache(task.clean, sites)
    _, corrupted = model.run_with_cache(task.corrupted, sites)
    total = 0
    for step in range(3):
        between = corrupted["hook_embed"] + (step / 3) * (clean["hook_embed"] - corrupted["hook_embed"])
        with model.edited(Edit("hook_embed", value=between)):
            _, _, gradients = model.run_with_gradients(
                task.corrupted, lambda logits: logit_diff(logits[:, -1], task.answers, task.wrong), sites
            )
        total = total + gradients["z", 1] / 3
    expected = ((clean["z", 1] - corrupted["z", 1]) * total).sum((1, 3))
    found = integrated_gradients(
        model, task, site="z", by=("layer", "head"), steps=3, rule="left", normalised=False, per_prompt=True
    )
    np.testing.assert_allclose(found.sel(layer=1), expected.numpy(), atol=1e-7)


def test_one_left_step_is_attribution_patching_on_either_path():
    model, task = tiny(), pairs_of_tokens()
    for direction in ("denoise", "noise"):
        options = {"site": "z", "by": ("layer", "head"), "direction": direction}
        expected = attribution_patching(model, task, **options)
        for path in ("embedding", "activation"):
            found = integrated_gradients(model, task, steps=1, rule="left", path=path, **options)
            np.testing.assert_allclose(found, expected, atol=1e-10)


def test_both_directions_of_the_embedding_path_agree():
    model, task = tiny(), pairs_of_tokens()
    options = {"site": "resid_pre", "steps": 20, "rule": "gauss-legendre"}
    both = [integrated_gradients(model, task, direction=one, **options) for one in ("denoise", "noise")]
    np.testing.assert_allclose(*both, atol=1e-4)


def test_batches_do_not_matter_and_attrs_say_how_it_was_done():
    model, task = tiny(), pairs_of_tokens()
    options = {"site": "result", "by": ("layer", "head"), "steps": 3, "path": "activation"}
    whole = integrated_gradients(model, task, **options)
    np.testing.assert_allclose(integrated_gradients(model, task, batch_size=1, **options), whole, atol=1e-10)
    assert {name: whole.attrs[name] for name in ("path", "rule", "steps")} == {
        "path": "activation",
        "rule": "midpoint",
        "steps": 3,
    }


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="steps=0"):
        rule_points(0, "left")
    with pytest.raises(ValueError, match="one of midpoint, left"):
        rule_points.__wrapped__(3, "simpson")
    with pytest.raises(ValueError, match="one of embedding, activation"):
        integrated_scores.__wrapped__(None, path="weights")
