"""What all estimates share, against finite differences on tiny random models in float64."""

import numpy as np
import pytest
import torch

import interp
from interp import Edit
from interp.metrics import logit_diff
from interp.model.sites import SITE_DIMS
from interp.patching import activation_patching
from interp.patching.estimate import first_order_scores, reduced, request
from tests.model.families import FAMILIES
from tests.patching.tokens_task import task_of_tokens

CHOICES = {
    "by": ("layer", "position"),
    "direction": "denoise",
    "metric": None,
    "normalised": True,
    "per_prompt": False,
    "batch_size": None,
    "progress": None,
}


def scores(model, task, sites, **choices):
    return first_order_scores(request(model, task, sites=sites, **(CHOICES | choices)), method="test")


def tiny(name, dtype=torch.float64, **options):
    model = interp.load(FAMILIES[name].make_model("eager", dtype), **options)
    clean = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(0))
    corrupted = clean.clone()
    corrupted[:, 2] = torch.tensor([41, 17, 33])
    corrupted[1, 4] = 50
    return model, task_of_tokens(clean, corrupted)


def last_metric(model, task, tokens):
    return logit_diff(model(tokens)[:, -1], task.answers, task.wrong)


ROUNDED = ("gemma2", "granite", "gpt_neox")
"""Families whose norms or softmax round to float32 inside, so that small steps cannot be told from rounding."""


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("family", ["gpt2", "falcon", *ROUNDED])
def test_every_site_is_the_slope_of_the_metric_towards_the_other_run(family, direction):
    model, task = tiny(family)
    kinds = list(dict.fromkeys(site.kind for site in model.site_names("*")))
    layered = [kind for kind in kinds if kind not in ("embed", "ln_final")]
    base, other = (task.corrupted, task.clean) if direction == "denoise" else (task.clean, task.corrupted)
    sign = 1 if direction == "denoise" else -1
    choices = {"direction": direction, "normalised": False, "per_prompt": True}
    found = scores(model, task, layered, by=("layer",), **choices)
    found |= scores(model, task, [kind for kind in kinds if kind not in layered], by=(), **choices)
    _, at_base = model.run_with_cache(base)
    _, at_other = model.run_with_cache(other)
    step, tolerance = (1e-2, 2e-3) if family in ROUNDED else (1e-5, 1e-7)
    layer = 1
    for kind in kinds:
        site = model.site_names(kind)[layer if kind in layered else 0]
        difference = (at_other[site] - at_base[site]).nan_to_num(0.0)
        ends = []
        for size in (step, -step):
            with model.edited(Edit(site, add=size * difference)):
                ends.append(last_metric(model, task, base))
        slope = sign * (ends[0] - ends[1]) / (2 * step)
        values = found[kind].sel(layer=layer) if kind in layered else found[kind]
        np.testing.assert_allclose(values.values, slope.numpy(), atol=tolerance, rtol=tolerance, err_msg=kind)
    assert all(one.dtype == np.float64 for one in found.values())


def test_scores_of_fewer_axes_are_sums_of_those_of_more():
    model, task = tiny("llama")
    options = {"normalised": False}
    finest = scores(model, task, ["z", "k"], by=("layer", "position", "head"), **options)
    for by in [("layer", "position"), ("layer", "head"), ("head",), ("position",), ("layer",), ()]:
        coarser = scores(model, task, ["z", "k"], by=by, **options)
        for site in ("z", "k"):
            gone = set(finest[site].dims) - set(by)
            np.testing.assert_allclose(coarser[site], finest[site].sum(gone), atol=1e-12)
    pattern = scores(model, task, ["pattern"], by=("layer", "head", "query", "key"), **options)["pattern"]
    by_query = scores(model, task, ["pattern"], by=("layer", "query"), **options)["pattern"]
    np.testing.assert_allclose(by_query, pattern.sum(("head", "key")), atol=1e-12)


@pytest.mark.parametrize("kind", SITE_DIMS)
def test_elements_are_summed_over_what_is_not_kept(kind):
    dims = SITE_DIMS[kind]
    elements = torch.randn([2, 3, 4, 5][: len(dims)])
    kept = [dim for dim in dims[1:] if dim in ("position", "head", "query", "key", "neuron")]
    for axes in ([], kept[:1], kept[-1:], kept):
        gone = tuple(place for place, dim in enumerate(dims) if dim != "batch" and dim not in axes)
        expected = elements.numpy().sum(gone) if gone else elements.numpy()
        np.testing.assert_allclose(reduced(elements, model_site(kind), axes), expected, rtol=1e-4, atol=1e-5)


def model_site(kind):
    return interp.Site(kind) if kind in ("embed", "ln_final") else interp.Site(kind, 0)


def test_head_results_have_the_scores_of_z():
    model, task = tiny("gemma2")
    found = scores(model, task, ["result", "z"], by=("layer", "position", "head"))
    np.testing.assert_array_equal(found["result"], found["z"])
    logits = {}
    _, source = model.run_with_cache(task.clean, "result")
    _, base = model.run_with_cache(task.corrupted, "result")
    for size in (1e-2, -1e-2):
        change = size * (source["result", 1] - base["result", 1])
        with model.edited(Edit("blocks.1.attn.hook_result", add=change, heads=[2], positions=[4])):
            logits[size] = last_metric(model, task, task.corrupted)
    slope = (logits[1e-2] - logits[-1e-2]).mean() / 2e-2
    gap = (last_metric(model, task, task.clean) - last_metric(model, task, task.corrupted)).mean()
    np.testing.assert_allclose(found["result"].sel(layer=1, position=4, head=2), slope / gap, rtol=5e-3)


@pytest.mark.parametrize("site", ["resid_pre", "z", "k", "attn_scores", "mlp_post"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_results_look_like_those_of_activation_patching(site, direction):
    model, task = tiny("llama", torch.float32)
    by = {"mlp_post": ("layer", "neuron"), "attn_scores": ("layer", "query", "key")}.get(site, ("layer", "position"))
    for per_prompt in (False, True):
        choices = {"by": by, "direction": direction, "per_prompt": per_prompt}
        found = scores(model, task, [site], **choices)[site]
        exact = activation_patching(model, task, site=site, **choices)
        assert found.dims == exact.dims
        for name in exact.coords:
            np.testing.assert_array_equal(found[name], exact[name])
        same = ("site", "direction", "metric", "normalised", "model", "task", "n_prompts", "model_dtype")
        assert {name: found.attrs[name] for name in same} == {name: exact.attrs[name] for name in same}
        for name in ("metric_clean", "metric_corrupted"):
            np.testing.assert_allclose(found.attrs[name], exact.attrs[name], rtol=1e-4)
        assert found.attrs["method"] == "test"
        assert found.attrs["unsigned"] == 0


def test_all_sites_share_two_forward_passes_a_batch(monkeypatch):
    model, task = tiny("llama")
    calls = []
    forward = model._forward
    monkeypatch.setattr(model, "_forward", lambda *args: calls.append(1) or forward(*args))
    kinds = ["resid_pre", "q", "k", "v", "z", "attn_out", "mlp_out"]
    together = scores(model, task, kinds)
    assert len(calls) == 2
    by_one = scores(model, task, kinds, batch_size=1)
    assert len(calls) == 2 + 2 * len(task)
    for kind in kinds:
        np.testing.assert_allclose(by_one[kind], together[kind], atol=1e-12)
        np.testing.assert_allclose(scores(model, task, [kind])[kind], together[kind], atol=1e-12)


def test_prompts_of_several_lengths_come_back_in_order():
    model, short = tiny("llama")
    generator = torch.Generator().manual_seed(3)
    clean = torch.randint(5, 60, (2, 9), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 1] += 1
    long = task_of_tokens(clean, corrupted)
    mixed = interp.tasks.Task(
        **{
            name: getattr(long, name) + getattr(short, name)
            for name in ("clean_ids", "corrupted_ids", "clean_text", "corrupted_text")
        },
        str_tokens=long.str_tokens + short.str_tokens,
        corrupted_str_tokens=long.corrupted_str_tokens + short.corrupted_str_tokens,
        answers=torch.full((5, 1), 5),
        wrong=torch.full((5, 1), 9),
        positions={},
        metric="logit_diff",
        index=torch.arange(5),
        name="mixed",
    )
    choices = {"by": ("layer", "head"), "per_prompt": True, "normalised": False}
    found = scores(model, mixed, ["z"], **choices)["z"]
    expected = [scores(model, task, ["z"], **choices)["z"] for task in (long, short)]
    np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-12)
    with pytest.raises(ValueError, match="several lengths"):
        scores(model, mixed, ["z"])


def test_differences_and_products_of_half_precision_are_computed_in_float32():
    model, task = tiny("llama", torch.bfloat16)
    rough = scores(model, task, ["resid_pre"], per_prompt=True, normalised=False)["resid_pre"]
    assert rough.dtype == np.float32
    _, clean = model.run_with_cache(task.clean, "resid_pre")
    answers, wrong = task.answers, task.wrong
    _, corrupted, gradients = model.run_with_gradients(
        task.corrupted, lambda logits: logit_diff(logits[:, -1], answers, wrong), "resid_pre"
    )
    site = model.site_names("resid_pre")[1]
    expected = ((clean[site].float() - corrupted[site].float()) * gradients[site].float()).sum(-1)
    np.testing.assert_allclose(rough.sel(layer=1).values, expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("family", ["falcon", "falcon-grouped", "gpt2", "olmo2"])
def test_runs_with_gradients_see_the_activations_of_plain_runs(family, frozen):
    model, task = tiny(family)
    model.hf.requires_grad_(not frozen)
    for sites in ("mlp_out", "attn_out", ["mlp_out", "attn_out", "resid_pre", "z"]):
        _, plain = model.run_with_cache(task.clean, sites)
        _, seen, _ = model.run_with_gradients(task.clean, lambda logits: logits[:, -1, 3], sites)
        for site in plain:
            torch.testing.assert_close(seen[site], plain[site], rtol=0, atol=1e-12)


def test_what_cannot_be_estimated_is_refused_before_any_run(monkeypatch):
    model, task = tiny("llama")
    monkeypatch.setattr(model, "_forward", None)
    for sites, choices, message in [
        (["z"], {"metric": "accuracy"}, "'accuracy' has no gradient"),
        (["z"], {"metric": "acuracy"}, "did you mean"),
        (["z", "pattern"], {}, "site 'pattern' has no axis 'position'"),
        (["zz"], {}, "did you mean"),
        ([], {}, "no sites"),
    ]:
        with pytest.raises(ValueError, match=message):
            scores(model, task, sites, **choices)
    with pytest.raises(ValueError, match="one of denoise, noise"):
        request.__wrapped__(model, task, sites=["z"], **(CHOICES | {"direction": "denoising"}))


def test_a_score_that_is_not_finite_is_an_error():
    model, task = tiny("llama")

    def broken(logits, answers, wrong):
        return logits[:, 0] * torch.tensor(float("inf"))

    with pytest.raises(FloatingPointError, match="'z'"):
        scores(model, task, ["z"], metric=broken, normalised=False)


def test_a_metric_that_does_not_tell_the_runs_apart_has_no_shares():
    model, task = tiny("llama")

    def constant(logits, answers, wrong):
        return logits[:, 0] * 0

    with pytest.raises(ValueError, match="nothing to be a share of"):
        scores(model, task, ["z"], metric=constant)
