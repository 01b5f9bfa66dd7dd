"""Subset diagnostics: bounds that hold on models whose effects are known, and the statistics against scipy."""

import numpy as np
import pytest
import torch
from scipy import stats

import interp
from interp.patching import activation_patching
from interp.patching.attribution import attribution_patching
from interp.patching.subsets import _compared, subset_bounds
from tests.model.families import FAMILIES
from tests.patching.linear_model import linear_model, pairs_of_tokens

BY = ("layer", "position", "head")


def one_layer():
    """Values of one layer of a linear model do not interact: the effect of several is the sum of theirs."""
    return linear_model(n_layers=1), pairs_of_tokens()


def test_the_difference_and_its_bound_are_welchs():
    generator = np.random.default_rng(0)
    chosen = generator.random((40, 3)) < 0.3
    effects = generator.normal(size=40) + 100 + 2 * chosen[:, 1]
    difference, bound = _compared(effects, chosen, 0.9)
    for cell in range(3):
        x, y = effects[chosen[:, cell]], effects[~chosen[:, cell]]
        test = stats.ttest_ind(x, y, equal_var=False)
        interval = test.confidence_interval(0.8)  # two tails of 10 %
        np.testing.assert_allclose(difference[cell], x.mean() - y.mean())
        half = (interval.high - interval.low) / 2
        np.testing.assert_allclose(bound[cell], abs(difference[cell]) + half, rtol=1e-9)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_bounds_hold_with_the_confidence_asked_for(level):
    effects = np.array([0.23, -0.2, 0.1, 0.05, 0, 0, 0, -0.15, 0.02])
    generator = np.random.default_rng(0)
    held, largest_held, n = np.zeros(effects.size), 0, 1000
    for _ in range(n):
        chosen = generator.random((100, effects.size)) < 0.5
        _, bound = _compared(chosen @ effects, chosen, level)
        held += bound >= abs(effects)
        largest_held += bound.max() >= abs(effects).max()
    assert (held / n > level - 0.03).all()
    assert abs(held[0] / n - level) < 0.03
    assert largest_held / n > level - 0.03


def test_on_a_linear_model_bounds_hold_and_close_in_on_the_effects():
    model, task = one_layer()
    exact = activation_patching(model, task, site="v", by=BY)
    estimate = attribution_patching(model, task, site="v", by=BY)
    spans = []
    for n_subsets in (50, 800):
        found = subset_bounds(model, task, estimate, n_subsets=n_subsets, seed=1)
        # Each holds with a probability of 95 %; of the 28 some four may fail by chance.
        assert int((found["bound"] >= abs(exact)).sum()) >= exact.size - 4
        spans.append(float((found["bound"] - abs(found["effect"])).mean()))
        assert found.attrs["bound"] == float(found["bound"].max())
    assert spans[1] < spans[0] / 2.5
    np.testing.assert_allclose(found["effect"], exact, atol=4 * spans[1])


def test_verified_cells_are_left_out_and_the_rest_is_bounded():
    model, task = one_layer()
    estimate = attribution_patching(model, task, site="v", by=BY, verify=4)
    found = subset_bounds(model, task, estimate, verified=4, n_subsets=100, seed=1)
    left_out = estimate["exact"].notnull()
    assert bool((found["bound"].isnull() == left_out).all())
    everything = subset_bounds(model, task, estimate, n_subsets=100)
    assert found.attrs["bound"] < everything.attrs["bound"]
    exact = activation_patching(model, task, site="v", by=BY)
    assert found.attrs["bound"] >= float(abs(exact).where(~left_out).max())


def test_bounds_are_reproducible_and_look_like_the_estimate():
    model, task = interp.load(FAMILIES["llama"].make_model("eager", torch.float64)), pairs_of_tokens()
    estimate = attribution_patching(model, task, site="mlp_out", by=("layer", "position"), per_prompt=True)
    one, two = (subset_bounds(model, task, estimate, n_subsets=20, share=0.3, seed=5) for _ in range(2))
    np.testing.assert_array_equal(one["bound"], two["bound"])
    assert one["bound"].dims == ("layer", "position")
    assert list(one["token"].values) == list(estimate["token"].values)
    other = subset_bounds(model, task, estimate, n_subsets=20, share=0.3, seed=6)
    assert not np.array_equal(one["bound"], other["bound"])


def test_what_cannot_be_compared_is_refused():
    model, task = one_layer()
    estimate = attribution_patching(model, task, site="v", by=BY)
    with pytest.raises(ValueError, match="leaves none of the 28 cells"):
        subset_bounds(model, task, estimate, verified=28)
    with pytest.raises(ValueError, match="share=1"):
        subset_bounds(model, task, estimate, share=1.0)
    with pytest.raises(ValueError, match="take more n_subsets"):
        subset_bounds(model, task, estimate, n_subsets=4, share=0.05)
