import copy

import numpy as np
import pytest
import torch

import interp
from interp import heads
from interp.heads.patterns import SCORES, stripes
from interp.model.attention import AttentionCall

T = 10


def planted(period: int, offset: int) -> dict[str, torch.Tensor]:
    """Which key each query attends to: where each score looks, in the rows where it is defined; key 1 elsewhere."""
    length = 2 * period + offset
    found = {}
    for name, first, back in (
        ("previous_token", 1, 1),
        ("induction", period + offset + 1, period - 1),
        ("duplicate_token", period + offset, period),
        ("current_token", 0, 0),
    ):
        queries = torch.arange(length)
        found[name] = torch.where(queries < first, 1, queries - back)
    found["first_token"] = torch.zeros(length, dtype=torch.long)
    return found


@pytest.mark.parametrize("offset", [0, 1])
def test_planted_patterns_score_one_on_their_own_score(tiny, offset: int) -> None:
    targets = planted(T, offset)
    length = 2 * T + offset
    keys = torch.eye(length).expand(1, len(targets), length, length)
    queries = 100 * torch.stack([torch.nn.functional.one_hot(one, length).float() for one in targets.values()])[None]
    module = heads.attention_calls.attention_modules(tiny, [0])[0]
    # Row 0 of a causal pattern has its own key only; without a mask of its own every query sees every key.
    call = AttentionCall(module, queries, keys, keys, None, {"scaling": 1.0, "is_causal": False})
    scores = stripes(T, offset)(call, slice(0, 1))
    assert set(scores) == set(SCORES)
    assert {name: values.shape[-1] for name, values in scores.items()} == {
        "previous_token": length - 1,
        "induction": T - 1,
        "duplicate_token": T,
        "current_token": length,
        "first_token": length,
    }
    for head, name in enumerate(targets):
        for score, values in scores.items():
            mean = float(values[0, head].mean())
            assert (mean == 1) if score == name else (mean < 0.2), (name, score)


def independent_scores(hf: torch.nn.Module, tokens: torch.Tensor, period: int, offset: int) -> dict[str, np.ndarray]:
    """The scores by plain loops over what transformers itself returns under eager attention."""
    before = hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = torch.stack(hf(tokens, output_attentions=True).attentions).numpy()
    finally:
        hf.set_attn_implementation(before)
    length = tokens.shape[1]

    def mean(queries: range, key) -> np.ndarray:
        return np.mean([attentions[:, :, :, query, key(query)].mean(1) for query in queries], axis=0)

    return {
        "previous_token": mean(range(1, length), lambda q: q - 1),
        "induction": mean(range(period + offset + 1, length), lambda q: q - period + 1),
        "duplicate_token": mean(range(period + offset, length), lambda q: q - period),
        "current_token": mean(range(length), lambda q: q),
        "first_token": mean(range(length), lambda q: 0),
    }


@pytest.mark.parametrize("bos", [None, 0])
def test_scores_equal_loops_over_eager_attentions(tiny, bos) -> None:
    tokens = heads.planted_tokens(tiny, period=T, n_sequences=5, bos=bos)
    expected = independent_scores(copy.deepcopy(tiny.hf), tokens, T, 0 if bos is None else 1)
    for batch_size in (None, 2):
        scores = heads.pattern_scores(tiny, tokens, batch_size=batch_size)
        for name in SCORES:
            np.testing.assert_allclose(scores[name], expected[name], atol=1e-5, err_msg=name)
    assert scores["induction"].attrs["n_rows"] == 5 * (T - 1)
    assert scores.attrs["period"] == T
    assert scores.sizes == {"layer": tiny.n_layers, "head": tiny.n_heads}


def test_scores_that_need_a_repetition_are_nan_without_one(tiny) -> None:
    tokens = torch.arange(5, 5 + 2 * T)[None]
    scores = heads.pattern_scores(tiny, tokens)
    assert np.isnan(scores["induction"]).all()
    assert np.isnan(scores["duplicate_token"]).all()
    assert scores["duplicate_token"].attrs["n_rows"] == 0
    assert np.isfinite(scores["previous_token"]).all()


def test_planted_tokens_repeat_ordinary_tokens(tiny_llama) -> None:
    tokens = heads.planted_tokens(tiny_llama, period=20, n_sequences=7, seed=3)
    assert tokens.shape == (7, 40)
    assert torch.equal(tokens[:, :20], tokens[:, 20:])
    assert all(len(set(row.tolist())) == 20 for row in tokens)
    assert not torch.isin(tokens, torch.tensor(tiny_llama.tokenizer.all_special_ids)).any()
    assert torch.equal(tokens, heads.planted_tokens(tiny_llama, period=20, n_sequences=7, seed=3))
    assert not torch.equal(tokens, heads.planted_tokens(tiny_llama, period=20, n_sequences=7, seed=4))
    with_bos = heads.planted_tokens(tiny_llama, period=20, n_sequences=7, seed=3, bos=0)
    assert torch.equal(with_bos[:, 1:], tokens)
    assert (with_bos[:, 0] == 0).all()


def test_planted_tokens_refuses_a_period_beyond_the_vocabulary(tiny_llama) -> None:
    with pytest.raises(ValueError, match="this vocabulary has"):
        heads.planted_tokens(tiny_llama, period=10**6)


def test_matching_score_counts_only_rows_in_which_the_mask_says_something() -> None:
    pattern = torch.eye(4).roll(1, 1)  # each query attends to the next key ...
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0, 1] = mask[1, 2] = True  # ... which is said of two rows, and holds in both
    assert heads.matching_score(pattern, mask) == 1
    mask[1, 2], mask[1, 3] = False, True
    assert heads.matching_score(torch.stack([pattern, pattern]), mask).tolist() == [0.5, 0.5]
    assert torch.isnan(heads.matching_score(pattern, torch.zeros(4, 4, dtype=torch.bool)))


def eager_attentions(model: interp.Model, tokens: torch.Tensor) -> np.ndarray:
    """[layer, prompt, head, query, key] by transformers."""
    hf = copy.deepcopy(model.hf)
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(hf(tokens, output_attentions=True).attentions).numpy()


def test_pattern_is_what_transformers_returns_and_carries_tokens(tiny) -> None:
    text = "Mary and John went to the store and John"
    tokens = tiny.to_tokens(text)
    expected = eager_attentions(tiny, tokens)[:, 0]
    for prompt in (text, tokens, tokens[0], {"input_ids": tokens}):
        found = heads.pattern(tiny, prompt, layers=1, heads=2)
        assert found.dims == ("layer", "head", "query", "key")
        np.testing.assert_allclose(found, expected[1:2, 2:3], atol=1e-6)
    assert list(found.key_token.values) == tiny.to_str_tokens(text)
    assert float(found.sum("key").mean()) == pytest.approx(1)
    # The order asked for is the order given; rows are those of the whole pattern.
    some = heads.pattern(tiny, text, layers=[1, 0], heads=[3, 0], rows=[5, 2])
    np.testing.assert_allclose(some, expected[[1, 0]][:, [3, 0]][:, :, [5, 2]], atol=1e-6)
    assert list(some["query"].values) == [5, 2]
    assert list(some.query_token.values) == [tiny.to_str_tokens(text)[row] for row in (5, 2)]
    np.testing.assert_allclose(some.sel(layer=1, head=0), expected[1, 0][[5, 2]], atol=1e-6)


def test_pattern_shows_edits_of_the_pattern(tiny) -> None:
    with tiny.edited(interp.Edit("blocks.0.attn.hook_pattern", heads=[1], value=0.25)):
        found = heads.pattern(tiny, "Mary and John", layers=[0, 1], heads=[0, 1])
        with pytest.raises(ValueError, match="edits of attention scores or pattern in force"):
            heads.attention_received(tiny, "Mary and John")
    assert (found.sel(layer=0, head=1) == 0.25).all()
    plain = heads.pattern(tiny, "Mary and John", layers=[0, 1], heads=[0, 1])
    np.testing.assert_allclose(found.sel(layer=0, head=0), plain.sel(layer=0, head=0), atol=1e-6)
    assert not np.allclose(found.sel(layer=1), plain.sel(layer=1), atol=1e-6)


def test_pattern_holds_no_more_than_the_rows_asked_for(tiny, monkeypatch) -> None:
    shapes = []
    original = heads.attention_calls.attention_pattern

    def watched(scores, sinks):
        shapes.append(tuple(scores.shape))
        return original(scores, sinks)

    monkeypatch.setattr("interp.heads.attention_calls.attention_pattern", watched)
    heads.pattern(tiny, torch.arange(5, 45), layers=[0], heads=[1, 2], rows=[7])
    assert shapes == [(1, 2, 1, 40)]


def test_pattern_refuses_what_does_not_exist(tiny) -> None:
    with pytest.raises(ValueError, match=r"head 4 is out of range; heads run 0\.\.3"):
        heads.pattern(tiny, "Mary", layers=0, heads=4)
    with pytest.raises(ValueError, match="layer -4 is out of range"):
        heads.pattern(tiny, "Mary", layers=[0, -4], heads=0)
    with pytest.raises(ValueError, match=r"row 9 is out of range; rows run 0\.\.8"):
        heads.pattern(tiny, torch.arange(9), layers=0, heads=0, rows=[9])
    with pytest.raises(ValueError, match="takes one prompt; got 2"):
        heads.pattern(tiny, torch.ones(2, 3, dtype=torch.long), layers=0, heads=0)


@pytest.mark.model
def test_smollm2_previous_token_and_induction_heads(smollm2) -> None:
    ids = np.random.default_rng(0).integers(20, 49000, (4, 50))
    tokens = torch.tensor(np.concatenate([ids, ids], axis=1))
    expected = independent_scores(smollm2.hf, tokens, 50, 0)
    scores = heads.pattern_scores(smollm2, tokens)
    for name in SCORES:
        np.testing.assert_allclose(scores[name], expected[name], atol=1e-4, err_msg=name)
    for name, head, value in (("previous_token", (16, 0), 0.899), ("induction", (18, 6), 0.885)):
        strongest = np.unravel_index(np.argmax(expected[name]), (30, 9))
        assert strongest == head
        assert strongest == np.unravel_index(scores[name].values.argmax(), (30, 9))
        assert float(scores[name][head]) == pytest.approx(value, abs=0.05)
