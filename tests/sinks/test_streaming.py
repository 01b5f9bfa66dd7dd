"""A streamed run is the dense run until a token is dropped, and a plain loop over lists of keys after that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import interp
from interp.model.anatomy import UnsupportedModel
from interp.sinks import streaming
from tests.model.families import FAMILIES
from tests.model.family import WINDOW
from tests.sinks.stream_loop import streamed_llama

N = 14
# Their positions are learned or ALiBi, or rotary goes round the attention interface.
WITHOUT_ROPE = ("gpt2", "gpt_neo", "gptj", "opt", "bloom", "falcon")
ROPE = [name for name, family in FAMILIES.items() if family.causal and not name.startswith(WITHOUT_ROPE)]


def model_of(name: str, implementation: str = "eager", dtype: torch.dtype = torch.float32) -> interp.Model:
    return interp.Model(FAMILIES[name].make_model(implementation, dtype))


def some_tokens(n_rows: int = 2, length: int = N, seed: int = 0) -> Tensor:
    return torch.randint(3, 59, (n_rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def fed(model: interp.Model, tokens: Tensor, chunks: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Logits of a run in chunks, and the number of keys kept after each."""
    cache, logits, kept = DynamicCache(), [], []
    for chunk in tokens.split(list(chunks), dim=1):
        output = model.hf(input_ids=chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
        kept.append(cache.layers[-1].keys.shape[-2])
    return torch.cat(logits, dim=1), kept


@pytest.mark.parametrize("name", ROPE)
def test_streamed_is_dense_before_the_first_eviction(name: str) -> None:
    # Without a mask to go by, transformers runs a dense PaliGemma under SDPA as if it were bidirectional.
    implementation = "eager" if name == "paligemma" else FAMILIES[name].implementations[-1]
    model, tokens = model_of(name, implementation), some_tokens(length=9)
    # The cache holds one token less: the last token still attends to all.
    with streaming(model, sinks=2, recent=6):
        streamed, _ = fed(model, tokens, [5, 2, 1, 1])
    torch.testing.assert_close(streamed, model(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ROPE)
def test_without_sinks_both_ways_of_counting_are_the_same(name: str) -> None:
    model, tokens = model_of(name), some_tokens(length=7)
    found = {}
    for rope in ("cache", "original"):
        with streaming(model, sinks=0, recent=WINDOW - 2, rope=rope):
            found[rope], _ = fed(model, tokens, [1] * 7)
    torch.testing.assert_close(found["cache"], found["original"], rtol=0, atol=1e-5)
    assert (found["cache"] - model(tokens))[:, WINDOW - 1 :].abs().max() > 0.01


@pytest.mark.parametrize("rope", ["cache", "original"])
@pytest.mark.parametrize(("sinks", "recent", "chunk"), [(0, 4, 1), (2, 4, 1), (1, 3, 3), (3, 4, 2)])
def test_streamed_is_the_plain_loop(sinks: int, recent: int, chunk: int, rope: str) -> None:
    """With chunks, the twin does not cut its lists inside a chunk."""
    model, tokens = model_of("llama", "sdpa", torch.float64), some_tokens(length=12)
    with streaming(model, sinks=sinks, recent=recent, rope=rope):
        found, kept = fed(model, tokens, [chunk] * (12 // chunk))
    cuts = set(range(chunk - 1, 12, chunk))
    expected = [
        streamed_llama(model.hf, row, sinks=sinks, recent=recent, rope=rope, cut_after=cuts) for row in tokens.tolist()
    ]
    # transformers computes the angles in float32.
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)
    assert kept == [min(end, sinks + recent) for end in range(chunk, 13, chunk)]


def test_a_chunk_is_token_by_token_until_something_is_dropped() -> None:
    model, tokens = model_of("llama"), some_tokens()
    with streaming(model, sinks=2, recent=4):
        by_token, _ = fed(model, tokens, [1] * N)
        in_chunks, _ = fed(model, tokens, [4, 3, 3, 4])
    torch.testing.assert_close(in_chunks[:, :7], by_token[:, :7], rtol=0, atol=1e-5)
    assert (in_chunks - by_token)[:, 7:].abs().max() > 1e-3


def generated(model: interp.Model, tokens: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Six new tokens a row, and the logits [row, step, vocab] that they were chosen by."""
    output = model.hf.generate(
        tokens,
        max_new_tokens=6,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        **{"do_sample": False, **options},
    )
    return output.sequences, torch.stack(output.logits, dim=1)


def test_generate_goes_on_as_the_plain_loop_does() -> None:
    """A prompt longer than the window is fed in chunks of `recent` tokens, the rest one by one."""
    model, tokens = model_of("llama", "sdpa", torch.float64), some_tokens(1, 8)
    with streaming(model, sinks=1, recent=4):
        ids, logits = generated(model, tokens)
        other = generated(model, tokens.flip(1))
        again = generated(model, tokens)
        beams, _ = generated(model, tokens, num_beams=3)
    row = ids[0].tolist()
    cuts = {3, 7, *range(8, len(row))}
    by_loop = streamed_llama(model.hf, row, sinks=1, recent=4, rope="cache", cut_after=cuts)
    torch.testing.assert_close(logits[0], by_loop[7:-1].float(), rtol=0, atol=1e-5)
    assert torch.equal(again[1], logits)
    assert (other[1] - logits).abs().min(dim=1).values.max() > 1e-3
    assert beams.shape == ids.shape
    assert torch.equal(model.generate(tokens, max_new_tokens=1)[0, :8], tokens[0])
    assert model.hf.generation_config.prefill_chunk_size is None


@pytest.mark.parametrize(("name", "rope"), [("llama", "cache"), ("llama", "original"), ("gemma2", "cache")])
def test_a_padded_batch_is_each_prompt_alone(name: str, rope: str) -> None:
    model = model_of(name)
    prompts = [some_tokens(1, length, seed=length)[0] for length in (3, 8, 5)]
    padded = torch.stack([torch.nn.functional.pad(one, (8 - len(one), 0)) for one in prompts])
    with streaming(model, sinks=2, recent=4, rope=rope):
        _, together = generated(model, padded, attention_mask=(padded != 0).long(), prefill_chunk_size=1)
        alone = [generated(model, one[None], prefill_chunk_size=1)[1] for one in prompts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_a_sliding_window_is_counted_in_the_cache() -> None:
    model, tokens = model_of("gemma2"), some_tokens()
    patterns = {}

    def see(pattern: Tensor, point: object) -> None:
        patterns[point.name.split(".")[1]] = pattern[0, :, -1]

    with streaming(model, sinks=2, recent=6), model.hooks([("pattern", see)]):
        fed(model, tokens, [1] * N)
    # Layers 0 and 2 slide.
    assert {layer: (one > 0).any(0).tolist() for layer, one in patterns.items()} == {
        "0": [False] * (9 - WINDOW) + [True] * WINDOW,
        "1": [True] * 9,
        "2": [False] * (9 - WINDOW) + [True] * WINDOW,
    }


def test_rotated_sites_are_those_of_a_dense_run() -> None:
    model, tokens = model_of("phi"), some_tokens()
    _, dense = model.run_with_cache(tokens, ["rot_q", "rot_k", "z"])
    seen: dict[str, Tensor] = {}
    with (
        streaming(model),
        model.hooks([(["rot_q", "rot_k", "z"], lambda value, point: seen.update({point.name: value.clone()}))]),
    ):
        fed(model, tokens, [N - 1, 1])
    for layer in range(3):
        torch.testing.assert_close(seen[f"blocks.{layer}.attn.hook_rot_k"], dense["rot_k", layer], rtol=0, atol=1e-5)
        for kind in ("rot_q", "z"):
            torch.testing.assert_close(
                seen[f"blocks.{layer}.attn.hook_{kind}"], dense[kind, layer][:, -1:], rtol=0, atol=1e-5
            )


def test_edits_count_positions_in_the_text() -> None:
    """An edit at a position that comes after tokens have been dropped acts there, and nowhere before."""
    model, tokens = model_of("llama"), some_tokens()
    edit = interp.Edit("blocks.1.attn.hook_z", positions=[10], value=0.0)
    with streaming(model, sinks=1, recent=4):
        plain, _ = fed(model, tokens, [1] * N)
        with model.edited(edit):
            edited, _ = fed(model, tokens, [1] * N)
    assert torch.equal(plain[:, :10], edited[:, :10])
    assert (plain - edited)[:, 10].abs().max() > 1e-3


@pytest.mark.parametrize(("name", "rope"), [("llava", "cache"), ("paligemma", "cache"), ("qwen2_vl", "original")])
def test_images_before_the_first_eviction(name: str, rope: str) -> None:
    model, inputs = model_of(name), FAMILIES[name].make_inputs()
    inputs = {key: value for key, value in inputs.items() if key != "position_ids"}
    options = {"max_new_tokens": 4, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    dense = model.hf.generate(**inputs, **options, do_sample=False)
    with streaming(model, sinks=2, recent=40, rope=rope):
        streamed = model.hf.generate(**inputs, **options, do_sample=False)
    torch.testing.assert_close(torch.stack(streamed.logits), torch.stack(dense.logits), rtol=0, atol=1e-5)


def test_positions_of_an_image_cannot_be_counted_in_the_cache() -> None:
    model, inputs = model_of("qwen2_vl"), FAMILIES["qwen2_vl"].make_inputs()
    with streaming(model), pytest.raises(ValueError, match="rope='original'"):
        model.hf.generate(**inputs, max_new_tokens=2)


def test_a_bad_request_is_refused() -> None:
    model, tokens = model_of("llama"), some_tokens()
    for sizes, message in (
        ({"sinks": -1}, "sinks >= 0"),
        ({"recent": 0}, "recent >= 1"),
        ({"rope": "alibi"}, "'cache' or 'original'"),
    ):
        with pytest.raises(ValueError, match=message), streaming(model, **sizes):
            pass
    used = DynamicCache()
    model.hf(input_ids=tokens, past_key_values=used)
    with streaming(model, sinks=1, recent=4):
        with pytest.raises(ValueError, match="already holds 14 tokens"):
            model.hf(input_ids=tokens[:, :1], past_key_values=used)
        with pytest.raises(ValueError, match="feed at most 4 a pass"):
            fed(model, tokens, [N])
        with pytest.raises(ValueError, match="feed at most 4 a pass"):
            model.generate(tokens, prefill_chunk_size=6)
    with streaming(model), pytest.raises(ValueError, match="the mask hides others"):
        model.hf(input_ids=tokens, past_key_values=DynamicCache(), attention_mask=(tokens != tokens[0, 5]).long())


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "falcon", "gptj"])
def test_a_family_without_known_rotary_is_refused(name: str) -> None:
    model = model_of(name)
    with pytest.raises(UnsupportedModel, match="rota"), streaming(model):
        pass


def test_the_model_is_left_as_found(tiny_llama: interp.Model) -> None:
    hf = tiny_llama.hf
    tokens = tiny_llama.to_tokens("Mary and John went to the store")
    before = tiny_llama(tokens)
    hf.generation_config.prefill_chunk_size = 3

    def run_into_an_error() -> None:
        with streaming(tiny_llama, sinks=1, recent=5):
            # A pass without a cache is dense.
            assert torch.equal(tiny_llama(tokens), before)
            fed(tiny_llama, tokens, [1] * tokens.shape[1])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run_into_an_error()
    assert torch.equal(tiny_llama(tokens), before)
    assert hf.generation_config.prefill_chunk_size == 3
    assert hf.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in hf.modules())
    cached, _ = fed(tiny_llama, tokens[:, :3], [2, 1])
    torch.testing.assert_close(cached, before[:, :3], rtol=0, atol=1e-5)
