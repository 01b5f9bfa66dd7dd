"""Accuracy against logits computed one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import interp
from interp import metrics, tasks


def test_equals_each_prompt_alone(tokenised_as: Callable[[str], interp.Model]):
    model = tokenised_as("single")
    task = tasks.ioi(model, n=9, one_length=False)
    found = tasks.accuracy(model, task, batch_size=2)
    assert len(task.by_length()) > 1
    for row, one in enumerate(task):
        for run, text in (("clean", one.clean_text[0]), ("corrupted", one.corrupted_text[0])):
            logits = model(text)[:, -1]
            mine = found.sel(run=run, prompt=row)
            expected = metrics.logit_diff(logits, one.answers, one.wrong).item()
            assert mine["prompt_metric"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert mine["prompt_accuracy"] == float(expected > 0)
            assert mine["prompt_rank"] == metrics.answer_rank(logits, one.answers, one.wrong).item()


def test_means_intervals_and_attributes(tokenised_as: Callable[[str], interp.Model]):
    model = tokenised_as("single")
    task = tasks.mcqa(model, n=20)
    found = tasks.accuracy(model, task)
    clean = found.sel(run="clean")
    assert found.attrs["chance"] == 0.25
    assert found.attrs["task"] == "mcqa"
    assert clean["metric"].sel(statistic="mean") == pytest.approx(clean["prompt_metric"].mean().item())
    assert clean["top1"].sel(statistic="mean") == (clean["prompt_rank"] == 0).mean()
    gap = found["prompt_metric"].sel(run="clean") - found["prompt_metric"].sel(run="corrupted")
    low, high = metrics.bootstrap_interval(gap.values)
    np.testing.assert_allclose(found["gap"], [gap.mean(), low, high])


@pytest.mark.model
def test_smollm2_finds_the_indirect_object(smollm2: interp.Model):
    found = tasks.accuracy(smollm2, tasks.ioi(smollm2, n=8))
    assert found["accuracy"].sel(run="clean", statistic="mean") == 1
    assert found["gap"].sel(statistic="low") > 3
