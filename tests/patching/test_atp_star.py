"""AtP*: each changed query and key against a run in which the pattern really changes, and GradDrop's sum by hand."""

import numpy as np
import pytest
import torch

import interp
from interp import Edit
from interp.metrics import logit_diff
from interp.model import Site
from interp.model.hooks import Tap, tapped
from interp.patching.atp_star import atp_star, qk_fixed_patching
from interp.patching.attribution import attribution_patching
from tests.model.families import FAMILIES
from tests.patching.linear_model import linear_model, pairs_of_tokens

LAYER = 1


def tiny(name):
    return interp.load(FAMILIES[name].make_model("eager", torch.float64))


def through_the_pattern(model, task, kind, places, direction):
    """Σ (pattern with each edit − pattern) · its gradient, in one layer, from runs of the model: [prompt, place].

    An edit puts in the other run's query or key at a place, given as what `Edit` takes beside site and value. All of
    them are rows of one batch.
    """
    base, source = (task.corrupted, task.clean) if direction == "denoise" else (task.clean, task.corrupted)
    pattern, site = Site("pattern", LAYER), Site(kind, LAYER)
    _, plain, gradients = model.run_with_gradients(
        base, lambda logits: logit_diff(logits[:, -1], task.answers, task.wrong), [pattern]
    )
    value = model.run_with_cache(source, [site])[1][site].repeat(len(places), 1, 1, 1)
    n = len(base)
    edits = [Edit(site, value=value, rows=range(n * one, n * one + n), **place) for one, place in enumerate(places)]
    with model.edited(edits):
        _, changed = model.run_with_cache(base.repeat(len(places), 1), [pattern])
    change = changed[pattern].unflatten(0, (len(places), n)) - plain[pattern]
    effects = (change * gradients[pattern]).sum((2, 3, 4)).T
    return (effects if direction == "denoise" else -effects).numpy()


@pytest.mark.parametrize(
    ("kind", "direction"), [("q", "denoise"), ("k", "denoise"), ("k", "noise"), ("rot_q", "noise")]
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_oss", "qwen3", "gpt_neox", "mistral"])
def test_queries_and_keys_go_through_the_softmax_exactly(name, kind, direction):
    model, task = tiny(name), pairs_of_tokens(n_prompts=2)
    n_heads = model.n_heads_at(kind)
    options = {"site": kind, "direction": direction, "normalised": False, "per_prompt": True}

    # float32 inside some norms and rotary tables.
    close = {"atol": 3e-6, "rtol": 1e-5}
    by_position = qk_fixed_patching(model, task, by=("layer", "position", "head"), **options).sel(layer=LAYER)
    places = [{"positions": [position], "heads": [head]} for position in range(7) for head in range(n_heads)]
    expected = through_the_pattern(model, task, kind, places, direction).reshape(2, 7, n_heads)
    assert float(np.abs(expected).max()) > 3e-4
    np.testing.assert_allclose(by_position, expected, **close)

    by_head = qk_fixed_patching(model, task, by=("layer", "head"), **options).sel(layer=LAYER)
    expected = through_the_pattern(model, task, kind, [{"heads": [head]} for head in range(n_heads)], direction)
    np.testing.assert_allclose(by_head, expected, **close)


def test_other_sites_are_attribution_patching():
    model, task = tiny("llama"), pairs_of_tokens()
    for site in ("z", "v", "mlp_out", "pattern"):
        by = ("layer", "head", "query") if site == "pattern" else ("layer", "position")
        found = qk_fixed_patching(model, task, site=site, by=by)
        np.testing.assert_allclose(found, attribution_patching(model, task, site=site, by=by), atol=1e-12)


def test_the_fix_vanishes_when_the_runs_are_close():
    model, task = tiny("gpt2"), pairs_of_tokens()
    embedding = model.hf.get_input_embeddings().weight
    with torch.no_grad():
        for clean, corrupted in zip(task.clean.flatten(), task.corrupted.flatten(), strict=True):
            if clean != corrupted:
                embedding[corrupted] = embedding[clean] + 1e-4 * torch.randn(embedding.shape[1])
    for site in ("q", "k"):
        options = {"site": site, "by": ("layer", "position", "head"), "normalised": False}
        plain, fixed = attribution_patching(model, task, **options), qk_fixed_patching(model, task, **options)
        scale = float(abs(plain).max())
        assert scale > 0
        np.testing.assert_allclose(fixed / scale, plain / scale, atol=1e-3)
        assert not np.array_equal(fixed, plain)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_where_the_runs_agree_queries_and_keys_have_exactly_no_effect(name, implementation):
    model, task = interp.load(FAMILIES[name].make_model(implementation)), pairs_of_tokens()
    for site in ("q", "k"):
        found = qk_fixed_patching(model, task, site=site)
        assert not found.isel(position=slice(0, 2)).values.any()


def gradient_dropped_by_hand(model, task, scores_of):
    """Mean over the layers left out of |scores|, from one run with detached outputs a layer."""
    total = 0.0
    for layer in range(model.n_layers):

        def cut(activation, run):
            return activation.detach()

        with tapped(model.anatomy, [Tap(Site(kind, layer), cut) for kind in ("attn_out", "mlp_out")]):
            total = total + np.abs(scores_of(layer))
    return total


@pytest.mark.parametrize("site", ["z", "resid_pre", "embed", "mlp_out", "ln1"])
def test_graddrop_averages_magnitudes_over_the_layers_left_out(site):
    model, task = tiny("llama"), pairs_of_tokens()
    sites = [Site("embed"), *(model.site_names(site) if site != "embed" else [])]
    _, clean = model.run_with_cache(task.clean, sites)
    _, corrupted = model.run_with_cache(task.corrupted, sites)

    def scores_of(layer):
        _, _, gradients = model.run_with_gradients(
            task.corrupted, lambda logits: logit_diff(logits[:, -1], task.answers, task.wrong), sites
        )
        found = []
        for one in sites if site == "embed" else sites[1:]:
            score = ((clean[one] - corrupted[one]) * gradients[one]).flatten(2).sum(-1)
            found.append(score * 0 if site == "mlp_out" and one.layer == layer else score)
        return torch.stack(found, dim=1).numpy()

    by = ("position",) if site == "embed" else ("layer", "position")
    found = atp_star(model, task, site=site, by=by, normalised=False, per_prompt=True)
    n_counted = model.n_layers - (site in ("z", "mlp_out", "ln1"))
    expected = gradient_dropped_by_hand(model, task, scores_of) / n_counted
    np.testing.assert_allclose(found, expected.reshape(found.shape), atol=1e-6)
    mean = atp_star(model, task, site=site, by=by, normalised=False)
    np.testing.assert_allclose(mean, expected.mean(0).reshape(mean.shape), atol=1e-6)
    assert mean.attrs["unsigned"] == 1


def test_graddrop_drops_gradients_of_the_pattern_before_the_fix():
    model, task = tiny("gpt2"), pairs_of_tokens()
    by = ("layer", "position", "head")

    def scores_of(layer):
        found = qk_fixed_patching(model, task, site="k", by=by, normalised=False, per_prompt=True)
        return found.values

    expected = gradient_dropped_by_hand(model, task, scores_of) / (model.n_layers - 1)
    found = atp_star(model, task, site="k", by=by, normalised=False, per_prompt=True)
    np.testing.assert_allclose(found, expected, atol=1e-10)
    normalised = atp_star(model, task, site="k", by=by, per_prompt=True)
    gap = normalised.attrs["metric_clean"] - normalised.attrs["metric_corrupted"]
    np.testing.assert_allclose(normalised, found / abs(gap), rtol=1e-6)


def test_without_layers_above_it_graddrop_of_a_linear_model_is_its_magnitude():
    model, task = linear_model(n_layers=2), pairs_of_tokens()
    plain = attribution_patching(model, task, site="z", by=("layer", "head"), per_prompt=True)
    found = atp_star(model, task, site="z", by=("layer", "head"), per_prompt=True)
    # Nothing lies between the last layer and the output, so leaving out the first changes nothing for it.
    np.testing.assert_allclose(found.sel(layer=1), abs(plain.sel(layer=1)), atol=1e-10)


def test_one_layer_is_too_few_and_other_families_have_no_pattern():
    with pytest.raises(ValueError, match="only one"):
        atp_star(linear_model(n_layers=1), pairs_of_tokens(), site="z")
    with pytest.raises(ValueError, match="AttentionInterface"):
        qk_fixed_patching(tiny("gptj"), pairs_of_tokens(), site="q")
