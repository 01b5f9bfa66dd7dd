"""Secant patching: results like those of exact patching, whose scores add up, from either end."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from interp.metrics import METRICS
from interp.patching import activation_patching
from interp.patching.secant import secant_metric, secant_patching
from interp.tasks import from_pairs

PAIRS = [
    ("When Mary and John went to the store, John gave a book to", "store, Mary", " Mary", " John"),
    ("When Tom and Alice went to the park, Alice gave a ring to", "park, Tom", " Tom", " Alice"),
    ("When Kate and Paul went to the office, Paul gave a drink to", "office, Kate", " Kate", " Paul"),
]


def pairs(model, prompts=PAIRS):
    described = []
    for clean, swapped, answer, wrong in prompts:
        place = swapped.partition(",")[0]
        rest = clean.partition(f"{place}, ")[2].partition(" ")[2]
        corrupted = clean.partition(f"{place}, ")[0] + f"{swapped} {rest}"
        described.append({"clean": clean, "corrupted": corrupted, "answer": answer, "wrong": wrong})
    return from_pairs(model, described)


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def task(model):
    return pairs(model)


@pytest.mark.parametrize(
    ("site", "by"),
    [
        ("resid_pre", ("layer", "position")),
        ("z", ("layer", "head")),
        ("result", ("layer", "head")),
        ("k", ("layer", "position", "head")),
        ("attn_scores", ("layer", "head")),
        ("pattern", ("layer", "head", "query")),
        ("mlp_post", ("layer", "neuron")),
        ("embed", ("position",)),
        ("mlp_out", ()),
    ],
)
def test_results_look_like_those_of_activation_patching(model, task, site, by):
    found = secant_patching(model, task[:2], site=site, by=by)
    exact = activation_patching(model, task[:2], site=site, by=by)
    assert found.dims == exact.dims
    assert found.shape == exact.shape
    assert set(found.coords) == set(exact.coords)
    assert found.attrs["method"] == "secant_patching"
    for name in ("site", "direction", "metric", "normalised", "metric_clean", "metric_corrupted", "seconds", "model"):
        assert name in found.attrs
    assert found.attrs["conservation_gap"] < 1e-5


def test_every_axis_of_a_pattern_can_be_kept(model, task):
    found = secant_patching(model, task, site="pattern", by=("layer", "head", "query", "key"))
    assert found.dims == ("layer", "head", "query", "key")
    heads = secant_patching(model, task, site="pattern", by=("layer", "head"))
    np.testing.assert_allclose(found.sum(("query", "key")).values, heads.values, atol=1e-5)
    assert bool((found.where(found["query"] < found["key"], 0) == 0).all())


def test_the_largest_scores_can_be_run_exactly(model, task):
    found = secant_patching(model, task, site="z", by=("layer", "head"), direction="noise", verify=2)
    exact = activation_patching(model, task, site="z", by=("layer", "head"), direction="noise")
    ran = found["exact"].notnull()
    assert int(ran.sum()) == 2
    np.testing.assert_allclose(found["exact"].where(ran, 0).values, exact.where(ran, 0).values, atol=1e-5)


def test_scores_of_each_layer_of_the_stream_add_up(model, task):
    found = secant_patching(model, task, site="resid_pre")
    np.testing.assert_allclose(found.sum("position").values, 1.0, atol=1e-4)
    per_prompt = secant_patching(model, task, site="resid_post", per_prompt=True, normalised=False)
    difference = [
        METRICS["logit_diff"](model(one)[:, -1], task.answers, task.wrong) for one in (task.clean, task.corrupted)
    ]
    expected = (difference[0] - difference[1]).numpy()[:, None].repeat(model.n_layers, 1)
    np.testing.assert_allclose(per_prompt.sum("position").values, expected, atol=1e-5)


def test_positions_before_the_first_difference_have_score_zero(model, task):
    first = int(task.first_difference.min())
    for site in ("resid_pre", "z", "mlp_out"):
        assert bool((secant_patching(model, task, site=site).isel(position=slice(0, first)) == 0).all())


def test_exchanging_the_two_runs_changes_the_sign_only(model, task):
    other_way = replace(
        task,
        clean_ids=task.corrupted_ids,
        corrupted_ids=task.clean_ids,
        clean_text=task.corrupted_text,
        corrupted_text=task.clean_text,
        str_tokens=task.corrupted_str_tokens,
        corrupted_str_tokens=task.str_tokens,
    )
    for site in ("z", "mlp_out", "k"):
        scores = [secant_patching(model, one, site=site, normalised=False).values for one in (task, other_way)]
        np.testing.assert_allclose(scores[0], -scores[1], atol=1e-6)


def test_direction_and_batches_do_not_matter(model, task):
    one = secant_patching(model, task, site="z", by=("layer", "position", "head"))
    for options in ({"direction": "noise"}, {"batch_size": 1}, {"batch_size": 2}):
        other = secant_patching(model, task, site="z", by=("layer", "position", "head"), **options)
        np.testing.assert_allclose(other.values, one.values, atol=1e-5)


def test_prompts_of_several_lengths(model):
    longer = ("When Mary and John went to the store, John gave a red book to", "store, Mary", " Mary", " John")
    task = pairs(model, [PAIRS[1], longer, PAIRS[2]])
    assert len(task.by_length()) == 2
    found = secant_patching(model, task, site="resid_pre", by=("layer",), per_prompt=True, normalised=False)
    for row in range(3):
        alone = secant_patching(model, task[[row]], site="resid_pre", by=("layer",), normalised=False)
        np.testing.assert_allclose(found.isel(prompt=row).values, alone.values, atol=1e-6)


def test_bad_requests_are_refused_before_any_run(model, task, monkeypatch):
    monkeypatch.setattr(model, "_forward", None)
    for options, message in (
        ({"site": "z", "by": ("layer", "neuron")}, "has no axis 'neuron'"),
        ({"site": "zz"}, "did you mean"),
        ({"site": "z", "metric": "accuracy"}, "no gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            secant_patching(model, task, **options)


def test_a_run_that_is_not_finite_names_the_first_site(model, task):
    with torch.no_grad():
        next(model.tower.blocks[1].mlp.parameters())[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"blocks\.1\.mlp"):
        secant_patching(model, task, site="z")


def test_frozen_parameters_and_bfloat16(model, task):
    expected = secant_patching(model, task, site="resid_pre")
    model.hf.requires_grad_(False)
    found = secant_patching(model, task, site="resid_pre")
    np.testing.assert_allclose(found.values, expected.values, atol=1e-6)
    model.hf.to(torch.bfloat16)
    rough = secant_patching(model, task, site="resid_pre")
    assert rough.attrs["model_dtype"] == "bfloat16"
    assert rough.values.dtype == np.float32
    np.testing.assert_allclose(rough.sum("position").values, 1.0, atol=0.2)


def test_a_linear_metric_keeps_its_gradient():
    logits, other = torch.randn(4, 1000).requires_grad_(), torch.randn(4, 1000)
    answers, wrong = torch.randint(500, (4, 2)), 500 + torch.randint(500, (4, 3))

    def metric(logits):
        return METRICS["logit_diff"](logits, answers, wrong)

    values = secant_metric(metric, logits, other)
    torch.testing.assert_close(values, metric(logits))
    (found,) = torch.autograd.grad(values.sum(), logits)
    (expected,) = torch.autograd.grad(metric(logits).sum(), logits)
    assert torch.equal(found, expected)
