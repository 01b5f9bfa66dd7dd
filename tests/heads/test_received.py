"""Attention received, and statistics and rows from queries and keys, on tiny models of every family."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import interp
from interp import heads
from interp.heads.attention_calls import attention_modules, call_stats, pattern_rows, visible_keys
from interp.model.attention import (
    AttentionCall,
    AttentionResult,
    attention_pattern,
    attention_scores,
    attention_wrapped,
)
from tests.model.families import FAMILIES

RUNS = [
    (name, implementation)
    for name, family in FAMILIES.items()
    for implementation in ("sdpa", "eager")
    if family.interface and (implementation == "eager" or family.architecture._supports_sdpa)
]
READ_THEIR_MASK = ("paligemma", "bert", "distilbert", "roberta")
"""A bidirectional prefix; prompts that are padded on the right."""
OFFSETS = (0, 1, 3)


def dense_statistics(scores: torch.Tensor, pattern: torch.Tensor) -> dict[str, torch.Tensor]:
    """The statistics from scores and pattern as the sites give them."""
    seen = ~torch.isneginf(scores)
    share = pattern / pattern.sum(-1, keepdim=True)
    n = pattern.shape[-1]
    away = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    return {
        "received": pattern.sum(2),
        "n_queries": seen.sum(2),
        "n_keys": seen.sum(-1),
        "maximum": pattern.amax(-1),
        "entropy": torch.special.entr(share).sum(-1),
        "distance": (share * away).sum(-1),
        "stripes": torch.stack([torch.nn.functional.pad(pattern.diagonal(-k, -2, -1), (k, 0)) for k in OFFSETS]),
    }


@pytest.mark.parametrize(("name", "implementation"), RUNS)
def test_statistics_and_rows_equal_those_of_the_pattern_site(name: str, implementation: str) -> None:
    family = FAMILIES[name]
    model = interp.Model(family.make_model(implementation, torch.float32))
    inputs = family.make_inputs()
    _, cache = model.run_with_cache(inputs, ["attn_scores", "pattern"])
    found, rows = {}, torch.tensor([3, 0])

    def see(call: AttentionCall, layer: int) -> AttentionResult:
        found[layer] = call_stats(call, offsets=OFFSETS), pattern_rows(call, [2, 0], rows), visible_keys(call, None)
        return call.run()

    modules = attention_modules(model, range(model.n_layers))
    with attention_wrapped({module: lambda call, at=layer: see(call, at) for layer, module in modules.items()}):
        model(inputs)
    for layer in range(model.n_layers):
        stats, some, visible = found[layer]
        pattern = cache["pattern", layer]
        for field, expected in dense_statistics(cache["attn_scores", layer], pattern).items():
            value = getattr(stats, field)
            torch.testing.assert_close(value.nan_to_num(0), expected.to(value.dtype), atol=1e-5, rtol=1e-5, msg=field)
        torch.testing.assert_close(some, pattern[:, [2, 0]][:, :, rows], atol=1e-5, rtol=0)
        assert (visible.mask is None) == (name not in READ_THEIR_MASK)


def test_received_is_the_mean_over_the_rows_that_may_attend(tiny) -> None:
    tokens = torch.randint(5, tiny.d_vocab, (5, 9), generator=torch.Generator().manual_seed(0))
    hf = copy.deepcopy(tiny.hf)
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = torch.stack(hf(tokens, output_attentions=True).attentions).numpy()
    expected = np.stack([attentions[:, :, :, key:, key].mean(-1) for key in range(9)], axis=-1).swapaxes(1, 2)
    for batch_size in (None, 2):
        found = heads.attention_received(tiny, tokens, batch_size=batch_size)
        assert found.dims == ("layer", "head", "prompt", "position")
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)
    some = heads.attention_received(tiny, tokens, layers=[1])
    assert list(some["layer"].values) == [1]
    np.testing.assert_allclose(some, expected[1:2], atol=1e-6)


def test_received_of_padded_prompts_equals_each_alone(tiny) -> None:
    texts = ["Mary and John went to the store", "Mary went"]
    together = heads.attention_received(tiny, texts)
    for prompt, text in enumerate(texts):
        alone = heads.attention_received(tiny, text)
        padding = together.sizes["position"] - alone.sizes["position"]
        np.testing.assert_allclose(together[:, :, prompt, padding:], alone[:, :, 0], atol=1e-6)
        assert np.isnan(together[:, :, prompt, :padding]).all()


def test_padding_on_the_right_neither_attends_nor_is_attended_to(tiny) -> None:
    ids = tiny.to_tokens("Mary and John went to the store")
    alone = heads.attention_received(tiny, ids)
    padded = torch.cat([ids, torch.full((1, 3), 7)], dim=1)
    mask = torch.ones_like(padded)
    mask[:, -3:] = 0
    found = heads.attention_received(tiny, {"input_ids": padded, "attention_mask": mask})
    np.testing.assert_allclose(found[..., :-3], alone, atol=1e-6)
    assert np.isnan(found[..., -3:]).all()


def test_without_a_mask_queries_are_aligned_as_the_model_aligns_them(tiny) -> None:
    """Fewer queries than keys and no mask: the places of a static cache that are not filled yet."""
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)
    call = AttentionCall(attention_modules(tiny, [0])[0], query, key, key, None, {"scaling": 0.5})
    scores = attention_scores(call.module, query, key, None, scaling=0.5)
    pattern = attention_pattern(scores)
    torch.testing.assert_close(call_stats(call).received, pattern.sum(2))
    torch.testing.assert_close(pattern_rows(call, range(4), torch.tensor([1])), pattern[:, :, 1:2])


def test_bad_input_is_refused(tiny) -> None:
    with pytest.raises(ValueError, match="layer 3 is out of range"):
        heads.attention_received(tiny, torch.ones(1, 3, dtype=torch.long), layers=[3])
    with pytest.raises(ValueError, match="no tokens"):
        heads.attention_received(tiny, torch.ones(0, 3, dtype=torch.long))
