"""The loss of streamed caches: the plain loop on a tiny Llama, published behaviour on SmolLM2."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

import interp
from interp.sinks import SinkWindow, sink_windows, stream_nll, stream_perplexity, streaming
from tests.model.families import FAMILIES
from tests.sinks.stream_loop import streamed_llama

WINDOWS = [SinkWindow(0, 4), SinkWindow(1, 3), SinkWindow(1, 3, "original"), SinkWindow(2, 4)]

# Without repetition: a model that copies from far back is hurt by any window.
PROSE = """\
The ferry left the island a little before seven, when the fog was still lying on the water and the lamps along the \
harbour wall had not yet been put out. Marta stood at the rail with her collar turned up and watched the white houses \
grow smaller. She had spent four summers there, teaching the fishermen's children to read, and she could not have said \
whether she was sad to be going or only tired. Behind her two sailors were arguing about the price of diesel. A dog \
slept under the bench, its nose on an old glove.

By noon the clouds had gone. The captain, a heavy man who spoke to nobody before lunch, came down from the bridge and \
offered her half of his bread. He asked what a schoolteacher did in winter, and when she told him that she repaired \
clocks for her uncle he laughed so loudly that the passengers looked up from their newspapers. Everyone believes that \
time runs faster in the city, he said, but it is the other way round, because in a village nothing gives you an excuse \
to be late.

She thought about this for the rest of the crossing. Her uncle's workshop smelled of oil and brass, and on the shelf \
above the door stood a row of broken alarm clocks that no customer had ever come back to collect. As a girl she used \
to wind all of them on New Year's Eve and wait for the moment when, one after another and never together, they began \
to ring. It had seemed to her the most beautiful noise in the world. Now she wondered who would buy such things, and \
whether the rent had gone up again, and why her last three letters had not been answered.
"""


@pytest.fixture
def model() -> interp.Model:
    return interp.Model(FAMILIES["llama"].make_model("sdpa", torch.float64))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 59, (3, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("chunk", [1, 3])
def test_each_variant_is_its_plain_loop(model: interp.Model, tokens: torch.Tensor, chunk: int) -> None:
    found = stream_nll(model, tokens, WINDOWS, chunk=chunk)
    assert found.dims == ("variant", "prompt", "position")
    assert found["variant"].values.tolist() == ["dense", "0+4", "1+3", "1+3 original", "2+4"]
    assert found["position"].values.tolist() == list(range(1, 11))
    cuts = set(range(chunk - 1, 11, chunk))
    for prompt, row in enumerate(tokens.tolist()):
        for window in [SinkWindow(0, 11), *WINDOWS]:
            logits = streamed_llama(
                model.hf, row, sinks=window.sinks, recent=window.recent, rope=window.rope, cut_after=cuts
            )
            expected = -torch.log_softmax(logits, dim=-1)[range(10), row[1:]]
            name = "dense" if window.recent == 11 else window.name
            np.testing.assert_allclose(found.sel(variant=name, prompt=prompt), expected, atol=1e-5)


def test_rows_and_batches_do_not_matter(model: interp.Model, tokens: torch.Tensor) -> None:
    together = stream_nll(model, tokens, WINDOWS)
    one_by_one = stream_nll(model, tokens, WINDOWS, batch_size=2)
    xr.testing.assert_allclose(together, one_by_one, atol=1e-5)
    for window in WINDOWS:
        alone = stream_nll(model, tokens, [window])
        np.testing.assert_allclose(alone[1], together.sel(variant=window.name), atol=1e-5)


def test_perplexity_by_hand() -> None:
    losses = np.log(np.array([[[1.0, 2.0, 8.0], [1.0, 4.0, 4.0]]], dtype=np.float32))
    nll = xr.DataArray(
        losses,
        dims=("variant", "prompt", "position"),
        coords={"variant": ["dense"], "position": [1, 2, 3]},
        attrs={"chunk": 1},
    )
    assert float(stream_perplexity(nll)[0]) == pytest.approx((2 * 8 * 4 * 4) ** (1 / 6), rel=1e-6)
    late = stream_perplexity(nll, first=2)
    assert float(late[0]) == pytest.approx((2 * 8 * 4 * 4) ** (1 / 4), rel=1e-6)
    assert late.attrs == {"chunk": 1, "first": 2}
    with pytest.raises(ValueError, match="no position from 4 on: the last one is 3"):
        stream_perplexity(nll, first=4)


def test_a_bad_request_is_refused(model: interp.Model, tokens: torch.Tensor) -> None:
    for variants, chunk, message in (
        ([], 1, "one cache or more"),
        ([SinkWindow(1, 3), SinkWindow(1, 3)], 1, "each once"),
        (WINDOWS, 4, "chunk is 1 to 3"),
        (WINDOWS, 0, "chunk is 1 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            stream_nll(model, tokens, variants, chunk=chunk)
    with pytest.raises(ValueError, match="nothing to predict"):
        stream_nll(model, tokens[:, :1], WINDOWS)
    with pytest.raises(ValueError, match="rotary"):
        stream_nll(interp.Model(FAMILIES["gpt2"].make_model()), tokens, WINDOWS)
    with pytest.raises(ValueError, match="5 tokens or more"):
        sink_windows(4)


def test_windows_to_compare() -> None:
    names = [one.name for one in sink_windows(64)]
    assert names == ["0+64", "1+63", "2+62", "4+60", "0+64 original", "4+60 original"]


@pytest.mark.model
@pytest.mark.slow
def test_one_sink_saves_the_window_of_smollm2(smollm2: interp.Model) -> None:
    """Over 200 tokens, one by one: dense 35.4, window 97.6 (2.76 times), one sink 37.7 (1.07 times). Here by fours."""
    tokens = smollm2.to_tokens(PROSE)[:, :300]
    nll = stream_nll(smollm2, tokens, [SinkWindow(0, 64), SinkWindow(1, 63)], chunk=4)
    before = nll.sel(position=slice(None, 65))
    assert float(np.abs(before - before.sel(variant="dense")).max()) <= 1e-4
    perplexity = stream_perplexity(nll, first=100)
    ratio = perplexity / perplexity.sel(variant="dense")
    assert float(ratio.sel(variant="0+64")) > 2
    assert float(ratio.sel(variant="1+63")) < 1.15


@pytest.mark.model
def test_generation_of_smollm2_is_dense_until_the_cache_is_full(smollm2: interp.Model) -> None:
    prompt = "The capital of France is"
    dense = smollm2.generate(prompt, max_new_tokens=12)
    with streaming(smollm2, sinks=1, recent=20):
        assert smollm2.generate(prompt, max_new_tokens=12) == dense
