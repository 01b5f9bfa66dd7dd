"""Dormant heads: planted ones, and both measures by loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
from interp import Edit, sinks

TOKENS = torch.randint(5, 100, (3, 8), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_both_measures_equal_loops(name: str, request: pytest.FixtureRequest):
    model = request.getfixturevalue(name)
    where = torch.rand(3, *TOKENS.shape, generator=torch.Generator().manual_seed(6)) < 0.3
    found = sinks.dormant_heads(model, TOKENS, sinks=where, mass=0.4, batch_size=2)
    _, cache = model.run_with_cache(TOKENS, ["pattern", "result"])
    for layer in range(3):
        for head in range(model.n_heads):
            mass, norm = [], []
            for prompt in range(3):
                for query in range(TOKENS.shape[1]):
                    if not where[layer, prompt, query]:
                        row = cache["pattern", layer][prompt, head, query]
                        mass.append(sum(float(row[key]) for key in range(8) if where[layer, prompt, key]))
                        norm.append(float(cache["result", layer][prompt, query, head].norm()))
            here = found.sel(layer=layer, head=head)
            np.testing.assert_allclose(here["sink_mass"], np.mean(mass), rtol=1e-5)
            np.testing.assert_allclose(here["output_norm"], np.mean(norm), rtol=1e-4)
        at = found.sel(layer=layer)
        little = at["output_norm"] < np.median(at["output_norm"])
        np.testing.assert_array_equal(at["writes_little"], little)
        np.testing.assert_array_equal(at["rests_on_sinks"], at["sink_mass"] >= 0.4)
        np.testing.assert_array_equal(at["dormant"], little & (at["sink_mass"] >= 0.4))


def attend_to(key: int, layer: int, kv_heads: list[int]) -> list[Edit]:
    """All queries alike, and one key along them: its heads attend to nothing else once it is there."""
    site = f"blocks.{layer}.attn.hook_rot_".__add__
    return [Edit(site("q"), value=1.0), Edit(site("k"), value=50.0, positions=[key], heads=kv_heads)]


def test_planted_heads(tiny_llama: interp.Model):
    """One head rests on the first token and writes little, one only rests there, one only writes little."""
    z = "blocks.1.attn.hook_z"
    edits = [*attend_to(0, 1, [0]), Edit(z, scale=0.01, heads=[0, 2]), Edit(z, scale=100.0, heads=[1, 3])]
    with tiny_llama.edited(edits):
        found = sinks.dormant_heads(tiny_llama, TOKENS).sel(layer=1)
    assert found["rests_on_sinks"].values.tolist() == [True, True, False, False]
    assert found["writes_little"].values.tolist() == [True, False, True, False]
    assert found["dormant"].values.tolist() == [True, False, False, False]
    assert found["sink_mass"].values[:2] == pytest.approx(1)


def test_the_sinks_own_rows_do_not_count(tiny_llama: interp.Model):
    """Row 0 puts all its attention on token 0 whatever the head does."""
    with tiny_llama.edited(attend_to(1, 0, [0, 1])):
        found = sinks.dormant_heads(tiny_llama, TOKENS).sel(layer=0)
    assert (found["sink_mass"] < 1e-6).all()


def test_nothing_but_sinks_is_undefined(tiny_llama: interp.Model):
    where = torch.zeros(3, *TOKENS.shape, dtype=torch.bool)
    where[2] = True
    found = sinks.dormant_heads(tiny_llama, TOKENS, sinks=where)
    assert np.isnan(found["sink_mass"].sel(layer=2)).all()
    assert np.isnan(found["output_norm"].sel(layer=2)).all()
    assert not found["dormant"].any()
    assert (found["sink_mass"].sel(layer=0) == 0).all()  # no sinks: no attention on them


@pytest.mark.model
def test_smollm2_has_dormant_heads_where_it_has_sinks(smollm2: interp.Model):
    tokens = interp.tasks.corpus.natural_text(smollm2, 4, 64)
    found = sinks.dormant_heads(smollm2, tokens)
    assert not found["rests_on_sinks"].sel(layer=slice(0, 1)).any()
    assert found["dormant"].sel(layer=slice(12, 27)).any()
