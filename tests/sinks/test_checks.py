"""Keys and values of sinks against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
from interp import Edit, sinks
from tests.model.families import FAMILIES

TOKENS = torch.randint(5, 100, (3, 7), generator=torch.Generator().manual_seed(2))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def by_loops(model: interp.Model, tokens: torch.Tensor, where: np.ndarray, causal: bool = True) -> dict:
    """Every mean written out; prompts in which a mean is undefined are left out."""
    _, cache = model.run_with_cache(tokens, ["v", "rot_q", "rot_k"])
    group = model.n_heads // model.n_kv_heads
    found = {
        "value_norm_ratio": np.full((model.n_layers, model.n_kv_heads), np.nan),
        "key_norm_ratio": np.full((model.n_layers, model.n_kv_heads), np.nan),
        "sink_cosine": np.full((model.n_layers, model.n_heads), np.nan),
        "other_cosine": np.full((model.n_layers, model.n_heads), np.nan),
    }
    for layer in range(model.n_layers):
        v, q, k = (cache[kind, layer].double().numpy() for kind in ("v", "rot_q", "rot_k"))
        for name, x in (("value_norm_ratio", v), ("key_norm_ratio", k)):
            for head in range(model.n_kv_heads):
                norms = np.linalg.norm(x[:, :, head], axis=-1)
                of_prompts = [
                    row[sink].mean() / row[~sink].mean()
                    for row, sink in zip(norms, where[layer], strict=True)
                    if sink.any() and not sink.all()
                ]
                if of_prompts:
                    found[name][layer, head] = np.mean(of_prompts)
        for head in range(model.n_heads):
            means = []
            for prompt, sink in enumerate(where[layer]):
                rows = []
                for query in range(len(sink)):
                    seen = range(query + 1) if causal else range(len(sink))
                    kinds = [[j for j in seen if sink[j] == kind] for kind in (True, False)]
                    if not sink[query] and all(kinds):
                        vectors = q[prompt, query, head], k[prompt, :, head // group]
                        rows.append([np.mean([cosine(vectors[0], vectors[1][j]) for j in keys]) for keys in kinds])
                if rows:
                    means.append(np.mean(rows, 0))
            if means:
                found["sink_cosine"][layer, head], found["other_cosine"][layer, head] = np.mean(means, 0)
    return found


def random_sinks(n_layers: int) -> torch.Tensor:
    where = torch.rand(n_layers, *TOKENS.shape, generator=torch.Generator().manual_seed(3)) < 0.3
    where[1] = False  # a layer without sinks
    where[0, 2] = False  # a prompt without sinks in a layer that has some
    where[2, 0] = True  # a prompt of nothing but sinks
    return where


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_means_equal_loops(name: str, request: pytest.FixtureRequest):
    model = request.getfixturevalue(name)
    where = random_sinks(model.n_layers)
    found = sinks.sink_checks(model, TOKENS, sinks=where, batch_size=2)
    for key, expected in by_loops(model, TOKENS, where.numpy()).items():
        np.testing.assert_allclose(found[key], expected, rtol=1e-4, atol=1e-6, err_msg=key)
    assert np.isnan(found["value_norm_ratio"].sel(layer=1)).all()
    assert np.isnan(found["sink_cosine"].sel(layer=1)).all()


def test_the_first_token_is_the_sink_by_default(tiny_llama: interp.Model):
    first = torch.zeros(3, *TOKENS.shape, dtype=torch.bool)
    first[..., 0] = True
    found = sinks.sink_checks(tiny_llama, TOKENS)
    for key, values in sinks.sink_checks(tiny_llama, TOKENS, sinks=first).items():
        np.testing.assert_array_equal(found[key], values)


def test_a_mask_goes_straight_in(tiny_llama: interp.Model):
    where = sinks.mask(tiny_llama, TOKENS, "norm", threshold=1.2)
    found = sinks.sink_checks(tiny_llama, TOKENS, sinks=where)
    for key, expected in by_loops(tiny_llama, TOKENS, where.values).items():
        np.testing.assert_allclose(found[key], expected, rtol=1e-4, atol=1e-6, err_msg=key)
    with pytest.raises(ValueError, match=r"shape \(3, 3, 6\); \[layer, prompt, position\] is \(3, 3, 7\)"):
        sinks.sink_checks(tiny_llama, TOKENS, sinks=where[..., 1:])


def test_a_planted_small_value(tiny_llama: interp.Model):
    small = Edit("blocks.1.attn.hook_v", scale=0.01, positions=[0])
    before = sinks.sink_checks(tiny_llama, TOKENS)["value_norm_ratio"].sel(layer=1)
    with tiny_llama.edited(small):
        after = sinks.sink_checks(tiny_llama, TOKENS)["value_norm_ratio"].sel(layer=1)
    np.testing.assert_allclose(after, before * 0.01, rtol=1e-5)


def test_queries_of_a_bidirectional_model_see_all_keys():
    family = FAMILIES["bert"]
    model = interp.Model(family.make_model("eager", torch.float32))
    where = random_sinks(model.n_layers)
    tokens = TOKENS % 20
    found = sinks.sink_checks(model, tokens, sinks=where)
    for key, expected in by_loops(model, tokens, where.numpy(), causal=False).items():
        np.testing.assert_allclose(found[key], expected, rtol=1e-4, atol=1e-6, err_msg=key)


@pytest.mark.model
def test_smollm2_sink_has_a_small_value_that_queries_point_to(smollm2: interp.Model):
    tokens = interp.tasks.corpus.natural_text(smollm2, 4, 64)
    found = sinks.sink_checks(smollm2, tokens).sel(layer=slice(12, 27))
    assert found["value_norm_ratio"].mean() < 0.5
    assert found["sink_cosine"].mean() > found["other_cosine"].mean() + 0.1
