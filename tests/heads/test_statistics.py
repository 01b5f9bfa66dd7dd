import copy

import numpy as np
import pytest
import torch
from scipy import stats

import interp
from interp import heads
from interp.heads.statistics import renormalised, row_distance, row_entropy


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length).tril().bool()[None, None]


def test_uniform_attention_has_entropy_one_and_the_distance_of_its_middle() -> None:
    allowed = causal(12)
    pattern = allowed / allowed.sum(-1, keepdim=True)
    entropy = row_entropy(pattern, allowed)[0, 0]
    assert torch.isnan(entropy[:7]).all()  # rows with fewer than 8 keys
    torch.testing.assert_close(entropy[7:], torch.ones(5))
    torch.testing.assert_close(row_distance(pattern)[0, 0], torch.arange(12) / 2)


def test_one_key_has_entropy_zero() -> None:
    allowed = causal(12)
    pattern = torch.zeros(1, 1, 12, 12)
    pattern[..., 0] = 1
    assert (row_entropy(pattern, allowed)[..., 7:] == 0).all()
    assert torch.equal(row_distance(pattern)[0, 0], torch.arange(12.0))


def test_keys_left_out_are_renormalised_and_leave_rows_without_keys_undefined() -> None:
    allowed = causal(12)
    pattern = torch.zeros(1, 1, 12, 12)
    pattern[..., 0] = 0.9
    pattern[..., 1:] = (0.1 / torch.arange(12).clamp(min=1))[:, None] * allowed[0, 0, :, 1:]
    shares, left = renormalised(pattern, allowed, [0])
    assert torch.isnan(row_distance(shares)[0, 0, 0])
    assert torch.isnan(row_entropy(shares, left)[0, 0, :8]).all()
    torch.testing.assert_close(row_entropy(shares, left)[0, 0, 8:], torch.ones(4))


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


def test_leaving_out_the_first_key_changes_entropy_and_not_first_token_mass(tiny, task) -> None:
    plain, without = (heads.attention_statistics(tiny, task, exclude=exclude) for exclude in ([], [0]))
    np.testing.assert_array_equal(plain["first_token_mass"], without["first_token_mass"])
    assert without["distance"].attrs["n_rows"] == plain["distance"].attrs["n_rows"] - len(task)
    assert (without["distance"] != plain["distance"]).any()


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
