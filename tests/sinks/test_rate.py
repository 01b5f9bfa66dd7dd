"""Sink rates against loops over eager patterns and hand-computed cases."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import xarray as xr

import interp
from interp import sinks
from interp.tasks.corpus import natural_text

LENGTH = 20


def received_array(values: np.ndarray) -> xr.DataArray:
    return xr.DataArray(values.astype(np.float32), dims=("layer", "head", "prompt", "position"))


def eager_patterns(model: interp.Model, tokens: torch.Tensor) -> np.ndarray:
    """[layer, prompt, head, query, key] as transformers itself computes them."""
    hf = copy.deepcopy(model.hf)
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(hf(tokens, output_attentions=True).attentions).double().numpy()


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_rates_equal_the_formula_by_loops(tiny_llama: interp.Model, epsilon: float):
    tokens = torch.randint(5, 100, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    patterns = eager_patterns(tiny_llama, tokens)
    found = sinks.sink_rate(tiny_llama, tokens, epsilon=epsilon)
    hidden = np.zeros((3, 4))
    for k in range(1, LENGTH + 1):
        votes = np.zeros((3, 4, 3))
        for layer, head, prompt in np.ndindex(3, 4, 3):
            alpha = sum(patterns[layer, prompt, head, i - 1, k - 1] for i in range(k, LENGTH + 1)) / (LENGTH - k + 1)
            votes[layer, head, prompt] = alpha > epsilon
            hidden[layer, head] += (k > 1 and alpha > 5 / LENGTH) / 3
        here = found.sel(position=k - 1)
        if k <= LENGTH / 2 or LENGTH - k + 1 >= 16:
            np.testing.assert_allclose(here["rate"], 100 * votes.mean(), rtol=1e-5)
            np.testing.assert_allclose(here["rate_by_layer"], 100 * votes.mean((1, 2)), rtol=1e-5)
            np.testing.assert_allclose(here["rate_by_head"], 100 * votes.mean(2), rtol=1e-5)
        else:
            assert np.isnan(here["rate"])
            assert np.isnan(here["rate_by_head"]).all()
    np.testing.assert_allclose(found["hidden_sinks"], hidden, atol=1e-6)


def test_the_indicator_comes_before_the_mean_over_prompts():
    values = np.zeros((1, 1, 4, 8))
    values[0, 0, 0, 0] = 1.0  # a mean of 0.25 < ε, yet a sink in one prompt of four
    found = sinks.rates(received_array(values))
    assert found["rate"].sel(position=0) == 25
    assert found["rate"].sel(position=1) == 0


def test_rows_left_decide_where_a_rate_is_given():
    def given(length: int) -> list[int]:
        found = sinks.rates(received_array(np.zeros((1, 1, 1, length))))
        return found["position"][found["rate"].notnull()].values.tolist()

    assert given(8) == [0, 1, 2, 3]
    assert given(9) == [0, 1, 2, 3]
    assert given(24) == list(range(12))
    assert given(64) == list(range(49))  # 16 rows at position 48


def test_hidden_sinks_leave_the_first_position_out():
    values = np.zeros((1, 2, 1, 10))
    values[..., 0] = values[0, 1, 0, 4] = values[0, 1, 0, 9] = 0.6
    found = sinks.hidden_sinks(received_array(values))
    assert np.argwhere(found.values).tolist() == [[0, 1, 0, 4], [0, 1, 0, 9]]
    assert sinks.rates(received_array(values))["hidden_sinks"].values.tolist() == [[0, 2]]
    assert not sinks.hidden_sinks(received_array(values), factor=7.0).any()


def test_undefined_attention_is_no_vote():
    values = np.full((1, 1, 2, 8), np.nan)
    values[0, 0, 0, 1] = 0.9
    found = sinks.rates(received_array(values))
    assert found["rate"].sel(position=1) == 100
    assert np.isnan(found["rate"].sel(position=0))


def test_epsilon_is_a_share(tiny_llama: interp.Model):
    with pytest.raises(ValueError, match="epsilon=30 is no share of attention"):
        sinks.sink_rate(tiny_llama, torch.ones(1, 8, dtype=torch.long), epsilon=30.0)


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_sinks_on_the_first_token_of_text_only(smollm2: interp.Model):
    tokens = natural_text(smollm2, 24, 64)
    found = sinks.sink_rate(smollm2, tokens)
    assert 70 < found["rate"].sel(position=0) < 82
    repeated = torch.tensor([500, 2000])[:, None].expand(2, 64)
    assert sinks.sink_rate(smollm2, repeated)["rate"].sel(position=0) < 1
    massive = sinks.massive_activations(smollm2, tokens[:8])["alive_share"].sel(massive_dimension=507).values
    entering = np.concatenate([[0], massive[:-1]])  # what enters layer l is the output of block l − 1
    assert np.corrcoef(found["rate_by_layer"].sel(position=0), entering)[0, 1] > 0.9
