from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

import interp
from interp import heads
from interp.heads import similarity
from tests.model.families import FAMILIES

TOKENS = torch.randint(5, 90, (3, 9), generator=torch.Generator().manual_seed(0))


def eager_attentions(hf: torch.nn.Module, tokens: torch.Tensor) -> np.ndarray:
    """[layer, prompt, head, query, key] as transformers itself returns it."""
    hf = copy.deepcopy(hf)
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(hf(tokens, output_attentions=True).attentions).double().numpy()


def by_loops(attentions: np.ndarray, metric: str, kept: np.ndarray) -> np.ndarray:
    """The similarity of two layers, one prompt, head and row after another; `kept` [prompt, key]."""
    n_layers, n_prompts, n_heads, n_queries, _ = attentions.shape
    found = np.full((n_layers, n_layers), np.nan)
    for one, other in np.ndindex(n_layers, n_layers):
        values = []
        for prompt, head in np.ndindex(n_prompts, n_heads):
            pair = [attentions[layer, prompt, head][:, kept[prompt]] for layer in (one, other)]
            rows = [query for query in range(n_queries) if all(each[query].sum() > 0 for each in pair)]
            a, b = (each[rows] / each[rows].sum(-1, keepdims=True) for each in pair)
            if not rows:
                continue
            if metric == "cosine":
                values.append((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
            else:
                values.append(np.mean([np.nan_to_num(jensenshannon(x, y, base=2)) ** 2 for x, y in zip(a, b)]))  # noqa: B905
        found[one, other] = np.mean(values)
    return found


@pytest.mark.parametrize("metric", ["cosine", "jensen_shannon"])
@pytest.mark.parametrize("exclude", [(), (0,), (0, 3)])
def test_similarity_is_that_of_loops_over_eager_attentions(tiny, metric, exclude):
    kept = np.ones((3, 9), dtype=bool)
    kept[:, list(exclude)] = False
    expected = by_loops(eager_attentions(tiny.hf, TOKENS), metric, kept)
    for batch_size in (None, 2):
        found = heads.layer_similarity(tiny, TOKENS, metric=metric, exclude=exclude, batch_size=batch_size)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.dims == ("layer", "other")
    np.testing.assert_allclose(np.diag(found), 1 if metric == "cosine" else 0, atol=1e-6)
    assert found.attrs["exclude"] == list(exclude)
    assert found.attrs["n_prompts"] == 3


@pytest.mark.parametrize("metric", ["cosine", "jensen_shannon"])
def test_positions_may_differ_from_prompt_to_prompt(tiny, metric):
    sinks = torch.zeros(3, 9, dtype=torch.bool)
    sinks[0, 0] = sinks[1, [0, 4]] = True
    sinks[2] = True  # nothing is left of this prompt
    expected = by_loops(eager_attentions(tiny.hf, TOKENS), metric, ~sinks.numpy())
    np.testing.assert_allclose(heads.layer_similarity(tiny, TOKENS, metric=metric, exclude=sinks), expected, atol=1e-5)
    assert np.isnan(heads.layer_similarity(tiny, TOKENS, metric=metric, exclude=torch.ones_like(sinks))).all()


@pytest.mark.parametrize("metric", ["cosine", "jensen_shannon"])
def test_long_prompts_are_read_in_blocks_of_queries(tiny, metric, monkeypatch):
    expected = heads.layer_similarity(tiny, TOKENS, metric=metric, exclude=[0])
    seen = []
    run = interp.Model.run_with_cache

    def watched(self, tokens, sites, **options):
        logits, cache = run(self, tokens, sites, **options)
        seen.append(sum(4 * cache[site].numel() for site in cache))
        return logits, cache

    monkeypatch.setattr(similarity, "BLOCK_BYTES", 4 * 3 * 4 * TOKENS.numel() * 2)
    monkeypatch.setattr(interp.Model, "run_with_cache", watched)
    found = heads.layer_similarity(tiny, TOKENS, metric=metric, exclude=[0])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert len(seen) == 5
    assert max(seen) <= similarity.BLOCK_BYTES


def test_a_task_of_several_lengths_weighs_every_prompt_alike(tiny, mixed_task):
    found = heads.layer_similarity(tiny, mixed_task)
    alone = [heads.layer_similarity(tiny, torch.tensor([ids])) for ids in mixed_task.clean_ids]
    np.testing.assert_allclose(found, np.mean(alone, axis=0), atol=1e-6)
    assert found.attrs["task"] == mixed_task.name


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_families_with_windows_have_a_similarity(name):
    family = FAMILIES[name]
    model = interp.Model(family.make_model("eager", torch.float32))
    found = heads.layer_similarity(model, family.make_inputs()["input_ids"], exclude=[0])
    assert np.isfinite(found).all()


def test_bad_arguments_are_refused(tiny):
    with pytest.raises(ValueError, match=r"position 9 is outside the prompt; positions run 0\.\.8"):
        heads.layer_similarity(tiny, TOKENS, exclude=[9])


@pytest.mark.model
def test_sinks_make_the_layers_of_smollm2_alike(smollm2):
    text = "The committee met on Tuesday to decide whether the old bridge over the river should be repaired or replaced"
    tokens = smollm2.to_tokens(text)
    whole, without = (heads.layer_similarity(smollm2, tokens, exclude=one) for one in ((), (0,)))
    pairs = np.triu_indices(30, 1)
    assert whole.values[pairs].mean() > without.values[pairs].mean() + 0.1
