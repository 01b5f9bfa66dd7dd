"""Contexts of features: against a plain reading of all activations at once, whatever the batches."""

import itertools

import numpy as np
import pytest
import torch

import interp
from interp.saes.architectures import make
from interp.saes.contexts import N_BINS, _Reading, feature_contexts
from interp.saes.sae import SAE
from interp.saes.splice import features_of

FEATURES = [3, 11]


@pytest.fixture
def sae() -> SAE:
    made = make("relu", 32, 24, seed=1, site="blocks.1.attn.hook_z")
    with torch.no_grad():
        made.b_enc.fill_(-0.2)
    return made


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 300, (24, 9), generator=torch.Generator().manual_seed(0))


def read(model: interp.Model, sae: SAE, tokens: torch.Tensor) -> np.ndarray:
    return features_of(model, tokens, sae)[..., FEATURES].detach().numpy()


def test_the_strongest_contexts_are_those_of_a_sort(tiny_gpt2, sae, tokens) -> None:
    found = feature_contexts(tiny_gpt2, sae, tokens, FEATURES, n_top=6, window=(3, 2), batch_size=11)
    activations = read(tiny_gpt2, sae, tokens)
    for index, feature in enumerate(FEATURES):
        mine = activations[..., index]
        order = np.argsort(-mine.max(1), kind="stable")[:6]
        top = found.sel(feature=feature).isel(context=found["group"].values == "top")
        assert top["sequence"].values.tolist() == order.tolist()
        assert top["position"].values.tolist() == mine.argmax(1)[order].tolist()
        assert top["peak"].values == pytest.approx(mine.max(1)[order])
        for row, sequence, position in zip(top["context"].values, order, mine.argmax(1)[order], strict=True):
            one = top.sel(context=row)
            for offset in range(-3, 3):
                at = position + offset
                cell = one.sel(offset=offset)
                if 0 <= at < 9:
                    assert int(cell["token_id"]) == int(tokens[sequence, at])
                    assert str(cell["token"].values) == tiny_gpt2.to_str_tokens([int(tokens[sequence, at])])[0]
                    assert float(cell["activation"]) == pytest.approx(mine[sequence, at], abs=1e-6)
                else:
                    assert int(cell["token_id"]) == -1
                    assert np.isnan(cell["activation"])
                    assert cell["token"].values == ""


def test_counts_range_and_histogram_are_those_of_all_activations(tiny_gpt2, sae, tokens) -> None:
    found = feature_contexts(tiny_gpt2, sae, tokens, FEATURES, batch_size=9)
    activations = read(tiny_gpt2, sae, tokens)
    for index, feature in enumerate(FEATURES):
        mine = activations[..., index].astype(np.float64)
        positive = mine[mine > 0]
        one = found.sel(feature=feature)
        assert int(one["n_active"]) == len(positive)
        assert float(one["density"]) == pytest.approx(len(positive) / mine.size)
        assert float(one["max"]) == pytest.approx(positive.max())
        edges = np.concatenate([[0], one["bin_edge"].values])
        assert edges[-1] / 2 < positive.max() <= edges[-1]
        expected = [int(((positive > low) & (positive <= high)).sum()) for low, high in itertools.pairwise(edges)]
        assert one["histogram"].values.tolist() == expected
        assert len(expected) == N_BINS


@pytest.mark.parametrize("order", ["as it is", "weakest first"])
def test_batches_and_blocks_change_nothing(tiny_gpt2, sae, tokens, order) -> None:
    if order == "weakest first":  # so that the range is doubled on the way
        tokens = tokens[torch.from_numpy(read(tiny_gpt2, sae, tokens)[..., 0].max(1).argsort())]
    whole = feature_contexts(tiny_gpt2, sae, tokens, FEATURES, seed=5, batch_size=24)
    small = feature_contexts(tiny_gpt2, sae, (block for block in tokens.split(10)), FEATURES, seed=5, batch_size=6)
    for name in whole.data_vars:
        if whole[name].dtype == object:
            assert (whole[name].values == small[name].values).all(), name
        else:
            np.testing.assert_allclose(whole[name].values, small[name].values, atol=1e-5, err_msg=name)


def test_interval_samples_lie_in_their_intervals_and_are_complete_where_few(tiny_gpt2, sae, tokens) -> None:
    found = feature_contexts(tiny_gpt2, sae, tokens, FEATURES, n_intervals=3, per_interval=8)
    peaks = read(tiny_gpt2, sae, tokens).max(1)
    for index, feature in enumerate(FEATURES):
        one = found.sel(feature=feature)
        low = 0.0
        for interval in found["interval"].values:
            high = float(one["interval_edge"].sel(interval=interval))
            drawn = one["peak"].values[found["group"].values == interval]
            drawn = drawn[~np.isnan(drawn)]
            inside = ((peaks[:, index] > low) & (peaks[:, index] <= high)).sum()
            assert ((drawn > low) & (drawn <= high)).all()
            assert len(drawn) == min(8, inside)
            low = high
        assert low >= float(one["max"])


def test_every_sequence_of_an_interval_is_drawn_equally_often() -> None:
    generator = np.random.default_rng(0)
    # The first sequences are the weakest, so that bins are merged on the way.
    peaks = np.sort(generator.random(30) ** 3).astype(np.float32)[:, None, None] + 0.01
    ids = np.zeros((30, 1), dtype=np.int64)
    counts, n_draws = np.zeros(30), 400
    for seed in range(n_draws):
        reading = _Reading(1, 0, 4, (0, 0), np.random.default_rng(seed))
        for start in range(0, 30, 5):
            reading.add(ids[start : start + 5], peaks[start : start + 5], 5)
        ((_, drawn),) = reading.intervals(0, 1)
        counts[[-one.sequence for one in drawn]] += 1
    expected = n_draws * 4 / 30
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-squared of 29 degrees, 97th percentile


def test_a_passage_that_comes_again_is_listed_once_where_it_is_strongest(tiny_gpt2, sae, tokens) -> None:
    alone = feature_contexts(tiny_gpt2, sae, tokens, FEATURES, n_top=6, window=(1, 0))
    twice = feature_contexts(
        tiny_gpt2, sae, torch.cat([tokens, tokens.flip(0)]), FEATURES, n_top=6, window=(1, 0), batch_size=7
    )
    group = alone["group"].values == "top"
    for name in ("token_id", "activation", "sequence"):
        np.testing.assert_array_equal(twice[name][:, group], alone[name][:, group])
    assert (twice["n_active"] == 2 * alone["n_active"]).all()


def test_of_the_same_passage_the_strongest_reading_stays() -> None:
    ids = np.array([[7], [8], [7], [9], [7]])
    reading = _Reading(1, 2, 0, (0, 0), np.random.default_rng(0))
    for row, peak in enumerate((3.0, 2.0, 5.0, 4.0, 1.0)):
        reading.add(ids[row : row + 1], np.full((1, 1, 1), peak, dtype=np.float32), 1)
    assert sorted((one.peak, -one.sequence) for one in reading.tops[0]) == [(4.0, 3), (5.0, 2)]


def test_nothing_after_the_site_is_computed(tiny_gpt2, sae, tokens) -> None:
    calls: list[str] = []
    blocks = tiny_gpt2.hf.transformer.h
    handles = [blocks[layer].register_forward_hook(lambda *_, at=layer: calls.append(at)) for layer in range(3)]
    try:
        feature_contexts(tiny_gpt2, sae, tokens[:2], FEATURES)
    finally:
        for handle in handles:
            handle.remove()
    assert calls == [0]


def test_excluded_positions_do_not_count(tiny_gpt2, sae, tokens) -> None:
    found = feature_contexts(tiny_gpt2, sae, tokens, FEATURES, exclude=[0, -9])  # the same position twice
    assert (found["position"].values != 0).all()
    mine = read(tiny_gpt2, sae, tokens)[:, 1:]
    assert found["density"].values == pytest.approx((mine > 0).mean((0, 1)))


def test_a_feature_that_is_never_on_has_no_contexts_and_no_maximum(tiny_gpt2, sae, tokens) -> None:
    with torch.no_grad():
        sae.b_enc[5] = -1e6
    found = feature_contexts(tiny_gpt2, sae, tokens, 5)
    assert np.isnan(found["max"]).all()
    assert np.isnan(found["peak"]).all()
    assert int(found["n_active"].sum()) == 0
    assert (found["sequence"].values == -1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": 24}, "feature 24 is out of range; features run 0..23"),
        ({"n_intervals": 33}, r"n_intervals=33 0\.\.32"),
        ({"tokens": torch.zeros(3, dtype=torch.long)}, r"tokens are ids \[sequence, pos\]"),
        ({"tokens": []}, "tokens is empty"),
        ({"exclude": [9]}, "position 9 is out of range"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused(tiny_gpt2, sae, tokens, changes, message) -> None:
    given = {"tokens": tokens, "features": FEATURES} | changes
    with pytest.raises(ValueError, match=message):
        feature_contexts(tiny_gpt2, sae, **given)
