"""The search for heads to calibrate, against one context a head."""

import numpy as np
import pytest
import torch
import xarray as xr

import interp
from interp.metrics import bootstrap_interval
from interp.sinks import head_search
from interp.sinks.calibration import calibrated
from interp.sinks.head_search import calibration_gain, calibration_search, raising_heads
from tests.patching.tokens_task import task_of_tokens
from tests.sinks.planted import N_HEADS, N_LAYERS, planted_llama

SETTINGS = {"alpha": 2.5, "beta": 0.3, "keep": (0,)}


@pytest.fixture(scope="module")
def model():
    return planted_llama()


@pytest.fixture(scope="module")
def task():
    clean = torch.randint(10, 60, (6, 10), generator=torch.Generator().manual_seed(3))
    clean[:, 0], clean[::2, 4], clean[1::2, 2] = 1, 9, 9
    corrupted = clean.clone()
    corrupted[:, 5] += 1
    return task_of_tokens(clean, corrupted)


def alone(model, task, heads):
    """Logit difference of each prompt with these heads calibrated, prompt by prompt."""
    values = []
    with calibrated(model, heads, **SETTINGS):
        for row, ids in enumerate(task.clean_ids):
            logits = model(torch.tensor([ids]))[0, -1].double()
            values.append(float(logits[task.answers[row, 0]] - logits[task.wrong[row, 0]]))
    return np.array(values)


def interval_of(values):
    return tuple(map(float, bootstrap_interval(values)))


def one_head(layer, head, shape=(N_LAYERS, N_HEADS)):
    heads = torch.zeros(shape, dtype=torch.bool)
    heads[layer, head] = True
    return heads


def test_it_is_one_context_a_head(model, task):
    found = calibration_search(model, task, metric="logit_diff", **SETTINGS)
    base = alone(model, task, torch.zeros(N_LAYERS, N_HEADS, dtype=torch.bool))
    assert found.attrs["baseline"] == pytest.approx(base.mean(), abs=1e-5)
    baseline_interval = (found.attrs["baseline_low"], found.attrs["baseline_high"])
    assert baseline_interval == pytest.approx(interval_of(base), abs=1e-5)
    n_changed = 0
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            cell = found.sel(layer=layer, head=head)
            if layer not in (2, 3):
                assert all(bool(cell[name].isnull()) for name in ("metric", "gain", "low", "high"))
                continue
            values = alone(model, task, one_head(layer, head))
            n_changed += bool(np.abs(values - base).max() > 1e-3)
            assert float(cell["metric"]) == pytest.approx(values.mean(), abs=1e-5)
            assert float(cell["gain"]) == pytest.approx((values - base).mean(), abs=1e-5)
            interval = (float(cell["low"]), float(cell["high"]))
            assert interval == pytest.approx(interval_of(values - base), abs=1e-5)
    assert n_changed > 2


def test_candidates_and_an_earlier_result(model, task, monkeypatch, tmp_path):
    whole = calibration_search(model, task, metric="logit_diff", **SETTINGS)
    first = calibration_search(model, task, metric="logit_diff", candidates=one_head(3, 1), **SETTINGS)
    assert int(first["metric"].notnull().sum()) == 1
    first.to_netcdf(tmp_path / "first.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "first.nc", engine="h5netcdf") as stored:
        both = calibration_search(model, task, metric="logit_diff", known=stored.load(), **SETTINGS)
    xr.testing.assert_allclose(both, whole, atol=1e-5)
    assert both.attrs.keys() == whole.attrs.keys()

    def refuse(*args, **options):
        raise AssertionError("nothing is left to run")

    monkeypatch.setattr(head_search, "sweep", refuse)
    again = calibration_search(model, task, metric="logit_diff", known=whole, **SETTINGS)
    xr.testing.assert_equal(again, whole)
    with pytest.raises(ValueError, match=r"the known result has beta = 0\.3, this search 0\.5"):
        calibration_search(model, task, metric="logit_diff", known=whole, **(SETTINGS | {"beta": 0.5}))


def test_accuracy_and_the_heads_that_raise_it(model, task):
    found = calibration_search(model, task, **SETTINGS)
    assert found.attrs["metric"] == "accuracy"
    for layer, head in ((2, 0), (3, 3)):
        expected = (alone(model, task, one_head(layer, head)) > 0).mean()
        assert float(found["metric"].sel(layer=layer, head=head)) == pytest.approx(expected)
    heads = raising_heads(found)
    assert heads.dims == ("layer", "head")
    assert heads.dtype == bool
    assert bool((heads == (found["metric"] > found.attrs["baseline"] + 1e-9)).all())


def test_gain_on_other_prompts(model, task):
    heads = one_head(2, 1) | one_head(3, 2) | one_head(2, 3)
    gain = calibration_gain(model, task, heads, metric="logit_diff", batch_size=4, **SETTINGS)
    before = alone(model, task, torch.zeros_like(heads))
    after = alone(model, task, heads)
    np.testing.assert_allclose(gain["prompt_metric"], [before, after], atol=1e-5)
    for run, values in (("before", before), ("after", after)):
        np.testing.assert_allclose(gain["metric"].sel(run=run), [values.mean(), *bootstrap_interval(values)], atol=1e-5)
    difference = after - before
    np.testing.assert_allclose(gain["gain"], [difference.mean(), *bootstrap_interval(difference)], atol=1e-5)
    assert gain.attrs["n_heads_calibrated"] == 3


def test_prompts_of_several_lengths_keep_their_order(tiny_llama):
    names = [("Mary", "John"), ("Tom", "James"), ("Alice", "Bob"), ("Kate", "Anna")]
    texts = ["{0} and {1} went to the store and {1} gave a book to", "{0} and {1} went and {1} gave a book to"]
    pairs = [
        {"clean": texts[row % 2].format(*two), "corrupted": texts[row % 2].format(*two[::-1])}
        | {"answer": f" {two[0]}", "wrong": f" {two[1]}"}
        for row, two in enumerate(names)
    ]
    task = interp.tasks.from_pairs(tiny_llama, pairs)
    heads = one_head(1, 2, (3, 4))
    found = calibration_search(tiny_llama, task, metric="logit_diff", candidates=heads, **SETTINGS)
    gain = calibration_gain(tiny_llama, task, heads, metric="logit_diff", **SETTINGS)
    np.testing.assert_allclose(gain["prompt_metric"].sel(run="after"), alone(tiny_llama, task, heads), atol=1e-5)
    assert float(found["metric"][1, 2]) == pytest.approx(float(gain["metric"].sel(run="after")[0]), abs=1e-5)


def test_mistakes_are_named(model, task):
    with pytest.raises(ValueError, match="did you mean 'accuracy'"):
        calibration_search(model, task, metric="acuracy")
    with pytest.raises(ValueError, match=r"must be torch\.bool of \[layer, head\]"):
        calibration_search(model, task, candidates=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="beta is 2"):
        calibration_search(model, task, beta=2.0)
