import copy

import numpy as np
import pytest
import torch
from scipy import stats

import interp
from interp import heads


def eager_attentions(model: interp.Model, tokens: torch.Tensor) -> np.ndarray:
    hf = copy.deepcopy(model.hf)
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(hf(tokens, output_attentions=True).attentions).numpy()


def test_statistics_equal_scipy_over_eager_attentions(tiny, mixed_task) -> None:
    found = heads.attention_statistics(tiny, mixed_task)
    entropies, distances, first, n_rows = [], [], [], 0
    for ids in mixed_task.clean_ids:
        attention = eager_attentions(tiny, torch.tensor([ids]))[:, 0]
        for query in range(len(ids)):
            keys = attention[:, :, query, : query + 1]
            if query + 1 >= 8:
                entropies.append(stats.entropy(keys, axis=-1) / np.log(query + 1))
            distances.append((keys * np.abs(np.arange(query + 1) - query)).sum(-1))
            first.append(keys[..., 0])
            n_rows += 1
    np.testing.assert_allclose(found["entropy"], np.mean(entropies, axis=0), atol=1e-5)
    np.testing.assert_allclose(found["distance"], np.mean(distances, axis=0), atol=1e-5)
    np.testing.assert_allclose(found["first_token_mass"], np.mean(first, axis=0), atol=1e-5)
    assert found["entropy"].attrs["n_rows"] == len(entropies)
    assert found["distance"].attrs["n_rows"] == n_rows
    assert found.attrs["task"] == mixed_task.name


def test_short_prompts_have_no_entropy(tiny) -> None:
    found = heads.attention_statistics(tiny, torch.tensor([[5, 6, 7]]))
    assert np.isnan(found["entropy"]).all()
    assert found["entropy"].attrs["n_rows"] == 0
    assert np.isfinite(found["distance"]).all()


def test_keys_left_out_are_renormalised_and_leave_rows_without_keys_undefined(tiny, task) -> None:
    plain, without = (heads.attention_statistics(tiny, task, exclude=exclude) for exclude in ([], [0]))
    np.testing.assert_array_equal(plain["first_token_mass"], without["first_token_mass"])
    assert without["distance"].attrs["n_rows"] == plain["distance"].attrs["n_rows"] - len(task)
    assert without["entropy"].attrs["n_rows"] == plain["entropy"].attrs["n_rows"] - len(task)
    attention = eager_attentions(tiny, task.clean)[:, :, :, 1:, 1:]
    shares = attention / attention.sum(-1, keepdims=True)
    rows = range(8, task.clean.shape[1])  # rows of 8 keys or more without the first
    entropies = [stats.entropy(shares[:, :, :, row - 1, :row], axis=-1) / np.log(row) for row in rows]
    np.testing.assert_allclose(without["entropy"], np.mean(entropies, axis=(0, 2)), atol=1e-5)


def test_attention_from_the_end_equals_single_entries(tiny, task) -> None:
    found = heads.end_attention(tiny, task)
    attention = eager_attentions(tiny, task.clean)[:, :, :, -1]
    for name in ("IO", "S1", "S1+1", "S2"):
        expected = np.mean([attention[:, row, :, task.positions[name][row]] for row in range(len(task))], axis=0)
        np.testing.assert_allclose(found.sel(target=name), expected, atol=1e-6)
    np.testing.assert_allclose(found.sel(target="answer"), found.sel(target="IO"), atol=1e-6)
    both = found.sel(target="S1") + found.sel(target="S2")
    np.testing.assert_allclose(found.sel(target="wrong"), both, atol=1e-6)


def test_attention_to_an_answer_that_is_not_in_the_prompt_is_nan(tiny) -> None:
    pair = {"clean": "Mary and John went", "corrupted": "Tom and John went", "answer": " store", "wrong": " school"}
    found = heads.end_attention(tiny, interp.tasks.from_pairs(tiny, [pair]))
    assert np.isnan(found.sel(target="answer")).all()


def test_families_without_the_attention_interface_say_so() -> None:
    import transformers

    config = transformers.GPTJConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, rotary_dim=4)
    model = interp.load(transformers.GPTJForCausalLM(config).eval())
    with pytest.raises(interp.SiteUnavailable, match="AttentionInterface"):
        heads.attention_statistics(model, torch.tensor([[5, 6, 7]]))
