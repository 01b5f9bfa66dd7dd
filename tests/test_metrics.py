"""Metrics against hand-computed values and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from interp import metrics

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 3.0, 1.0]])
ANSWERS = torch.tensor([[0, -1], [1, 3]])
WRONG = torch.tensor([[1, 2], [2, -1]])


def test_logit_diff_by_hand():
    expected = [2.0 - (1.0 + 0.0) / 2, (0.0 + 1.0) / 2 - 3.0]
    assert metrics.logit_diff(LOGITS, ANSWERS, WRONG).tolist() == expected


def test_probabilities_against_scipy():
    probabilities = scipy.special.softmax(LOGITS.double().numpy(), axis=-1)
    difference = [
        probabilities[0, 0] - probabilities[0, 1:3].sum(),
        probabilities[1, [1, 3]].sum() - probabilities[1, 2],
    ]
    log_probability = [math.log(probabilities[0, 0]), math.log(probabilities[1, [1, 3]].sum())]
    np.testing.assert_allclose(metrics.prob_diff(LOGITS, ANSWERS, WRONG), difference, rtol=1e-6)
    np.testing.assert_allclose(metrics.log_prob(LOGITS, ANSWERS, WRONG), log_probability, rtol=1e-6)


def test_rank_and_accuracy():
    assert metrics.answer_rank(LOGITS, ANSWERS, WRONG).tolist() == [0, 1]
    assert metrics.accuracy(LOGITS, ANSWERS, WRONG).tolist() == [1, 0]


def test_without_wrong_answers_accuracy_is_over_the_vocabulary():
    no_wrong = torch.empty(2, 0, dtype=torch.long)
    assert metrics.accuracy(LOGITS, ANSWERS, no_wrong).tolist() == [1, 0]
    assert metrics.logit_diff(LOGITS, ANSWERS, no_wrong).isnan().all()


def test_ties_count_against_the_answer():
    tied = torch.zeros(1, 5)
    answers, wrong = torch.tensor([[0, 1]]), torch.tensor([[2]])
    assert metrics.accuracy(tied, answers, wrong).item() == 0
    assert metrics.answer_rank(tied, answers, wrong).item() == 3  # the other right answer does not count


@pytest.mark.parametrize("name", metrics.METRICS)
def test_a_prompt_without_an_answer_is_nan(name: str):
    metric = metrics.METRICS[name]
    answers = torch.tensor([[0], [-1]])
    values = metric(LOGITS, answers, WRONG)
    assert not values[0].isnan()
    assert values[1].isnan()
    assert metric(LOGITS, torch.empty(2, 0, dtype=torch.long), WRONG).isnan().all()


@pytest.mark.parametrize("name", metrics.METRICS)
def test_batch_equals_each_prompt_alone(name: str):
    metric = metrics.METRICS[name]
    alone = [metric(LOGITS[[row]], ANSWERS[[row]], WRONG[[row]]) for row in range(2)]
    torch.testing.assert_close(metric(LOGITS, ANSWERS, WRONG), torch.cat(alone))


@pytest.mark.parametrize("name", metrics.METRICS)
def test_bfloat16_logits_are_accumulated_in_float32(name: str):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(4, 5000, generator=generator) * 3).bfloat16()
    answers, wrong = torch.arange(40).reshape(4, 10), torch.arange(100, 140).reshape(4, 10)
    values = metrics.METRICS[name](logits, answers, wrong)
    assert values.dtype == torch.float32
    exact = metrics.METRICS[name](logits.double(), answers, wrong)
    torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", [metrics.logit_diff, metrics.prob_diff, metrics.log_prob])
def test_gradients_are_right_and_finite_with_padding(metric: metrics.Metric):
    logits = LOGITS.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda values: metric(values, ANSWERS, WRONG), (logits,))


def test_log_prob_of_a_missing_answer_leaves_other_gradients_finite():
    logits = LOGITS.clone().requires_grad_()
    metrics.log_prob(logits, torch.tensor([[0], [-1]]), WRONG)[0].backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_kl_against_scipy():
    other = LOGITS.flip(-1)
    expected = scipy.stats.entropy(
        scipy.special.softmax(LOGITS.double().numpy(), axis=-1),
        scipy.special.softmax(other.double().numpy(), axis=-1),
        axis=-1,
    )
    np.testing.assert_allclose(metrics.kl_divergence(LOGITS, other), expected, rtol=1e-5)
    assert metrics.kl_divergence(LOGITS, LOGITS).tolist() == [0, 0]
    assert metrics.kl_divergence(LOGITS.bfloat16(), other.bfloat16()).dtype == torch.float32


def test_kl_with_ruled_out_tokens():
    base = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert metrics.kl_divergence(base, base).item() == 0
    assert metrics.kl_divergence(base, torch.zeros(1, 3)).item() == pytest.approx(math.log(3 / 2))
    assert metrics.kl_divergence(torch.zeros(1, 3), base).item() == math.inf


def test_metric_named_offers_near_names():
    assert metrics.metric_named("log_prob") is metrics.log_prob
    with pytest.raises(ValueError, match="'logit_dif' is not a metric; did you mean 'logit_diff'"):
        metrics.metric_named("logit_dif")


def test_normalised_effect_by_prompt_and_of_means():
    effect = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    clean, corrupted = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 5.0])
    normalised = metrics.normalised_effect(effect, clean, corrupted)
    assert normalised[0].tolist() == [0.5, 1.0]
    assert normalised[1].isnan().all()
    torch.testing.assert_close(metrics.normalised_effect(effect, clean.mean(), corrupted.mean()), effect)


def test_normalised_effect_of_a_gap_within_rounding_is_nan():
    clean = torch.tensor([10.0])
    assert metrics.normalised_effect(torch.ones(1), clean, torch.nextafter(clean, clean - 1)).isnan().all()


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(3).exponential(size=60)
    low, high = metrics.bootstrap_interval(values, n_resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    np.testing.assert_allclose([low, high], theirs, atol=0.01)


def test_bootstrap_covers_the_true_mean_as_often_as_it_says():
    samples = np.random.default_rng(0).normal(size=(50, 1000))
    low, high = metrics.bootstrap_interval(samples, level=0.9, n_resamples=400)
    assert 0.85 < np.mean((low < 0) & (high > 0)) < 0.93


def test_bootstrap_over_axes_equals_each_cell_alone(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(0).normal(size=(3, 7, 2))
    monkeypatch.setattr(metrics, "_BOOTSTRAP_BUDGET", 2000)  # two cells at a time
    low, high = metrics.bootstrap_interval(values, axis=1)
    assert low.shape == high.shape == (3, 2)
    alone = metrics.bootstrap_interval(torch.tensor(values[2, :, 1]))
    np.testing.assert_allclose((low[2, 1], high[2, 1]), alone)


def test_bootstrap_is_seeded_and_leaves_the_global_state_alone():
    values = torch.randn(20, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = np.random.get_state()[1].tolist()  # noqa: NPY002 (the legacy global state is what must not move)
    assert metrics.bootstrap_interval(values, seed=1) == metrics.bootstrap_interval(values, seed=1)
    assert metrics.bootstrap_interval(values, seed=1) != metrics.bootstrap_interval(values, seed=2)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_bootstrap_is_nan_where_it_is_undefined():
    assert np.isnan(metrics.bootstrap_interval(np.ones((1, 3)))).all()
    values = np.ones((5, 2))
    values[0, 1] = np.nan
    low, high = metrics.bootstrap_interval(values)
    assert low[0] == high[0] == 1
    assert np.isnan([low[1], high[1]]).all()


def test_bootstrap_level_is_a_share():
    with pytest.raises(ValueError, match=r"level is 95\.0"):
        metrics.bootstrap_interval(np.ones(4), level=95.0)
