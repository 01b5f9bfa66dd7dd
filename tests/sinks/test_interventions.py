"""Overwriting massive activations, against plain PyTorch hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
from interp import sinks
from interp.tasks.corpus import natural_text

TOKENS = torch.randint(5, 100, (4, 9), generator=torch.Generator().manual_seed(4))
DIMENSIONS, LAYER, POSITIONS = [3, 17], 1, [0, 4]


def perplexity(model: interp.Model, change) -> tuple[list[float], float]:
    """(mean NLL of each prompt, perplexity) of a forward whose block output `change` may overwrite."""

    def hook(module, args, output):
        resid = (output[0] if isinstance(output, tuple) else output).clone()
        change(resid)
        return (resid, *output[1:]) if isinstance(output, tuple) else resid

    handle = model.tower.blocks[LAYER].module.register_forward_hook(hook)
    with torch.no_grad():
        log_probs = model.hf(TOKENS).logits.double().log_softmax(-1)
    handle.remove()
    nll = [
        float(-np.mean([log_probs[row, i, TOKENS[row, i + 1]] for i in range(TOKENS.shape[1] - 1)]))
        for row in range(len(TOKENS))
    ]
    return nll, float(np.exp(np.mean(nll)))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_each_intervention_equals_a_hand_edited_forward(name: str, request: pytest.FixtureRequest):
    model = request.getfixturevalue(name)
    found = sinks.intervene(model, TOKENS, DIMENSIONS, LAYER, positions=POSITIONS, batch_size=3)
    others = found.attrs["random_dimensions"]
    assert len(others) == 2
    assert not set(others) & set(DIMENSIONS)

    def zero(dimensions):
        def change(resid):
            for position in POSITIONS:
                resid[:, position, dimensions] = 0

        return change

    def mean(resid):
        for position in POSITIONS:
            for dimension in DIMENSIONS:
                resid[:, position, dimension] = resid[:, position, dimension].mean()

    changes = {"baseline": lambda resid: None, "zero": zero(DIMENSIONS), "mean": mean, "random": zero(others)}
    for intervention, change in changes.items():
        nll, total = perplexity(model, change)
        here = found.sel(intervention=intervention)
        np.testing.assert_allclose(here["nll"], nll, rtol=1e-5, err_msg=intervention)
        np.testing.assert_allclose(here["perplexity"], total, rtol=1e-5, err_msg=intervention)
    assert len(set(found["perplexity"].values.round(4))) == 4  # they can be told apart


def test_the_first_token_is_the_default_and_negative_positions_count_from_the_end(tiny_llama: interp.Model):
    first = sinks.intervene(tiny_llama, TOKENS, DIMENSIONS, LAYER)
    assert first.attrs["positions"] == [0]
    same = sinks.intervene(tiny_llama, TOKENS, DIMENSIONS, LAYER, positions=[-9])
    np.testing.assert_array_equal(first["nll"], same["nll"])


def test_random_dimensions_follow_the_seed(tiny_llama: interp.Model):
    drawn = [
        sinks.intervene(tiny_llama, TOKENS[:1], [1, 2, 3], 0, seed=seed).attrs["random_dimensions"]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 3


def test_what_makes_no_sense_is_refused(tiny_llama: interp.Model):
    with pytest.raises(ValueError, match=r"layer 3 is out of range; layers run 0\.\.2"):
        sinks.intervene(tiny_llama, TOKENS, DIMENSIONS, 3)
    with pytest.raises(ValueError, match="position 9 is outside the prompt"):
        sinks.intervene(tiny_llama, TOKENS, DIMENSIONS, 0, positions=[9])
    with pytest.raises(ValueError, match="17 of 32 dimensions leave too few others"):
        sinks.intervene(tiny_llama, TOKENS, range(17), 0)
    with pytest.raises(ValueError, match="one dimension and position at least"):
        sinks.intervene(tiny_llama, TOKENS, [], 0)


@pytest.mark.model
def test_smollm2_needs_its_sink_dimension_as_a_constant(smollm2: interp.Model):
    tokens = natural_text(smollm2, 6, 64, seed=1)
    perplexity = sinks.intervene(smollm2, tokens, [507], 11)["perplexity"]
    assert perplexity.sel(intervention="zero") / perplexity.sel(intervention="mean") > 1e3
    for intervention in ("mean", "random"):
        assert perplexity.sel(intervention=intervention) / perplexity.sel(intervention="baseline") < 1.1
