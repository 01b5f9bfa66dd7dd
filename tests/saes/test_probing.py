import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

import interp
from interp.saes.probing import sparse_probing
from interp.saes.relu import ReLUSAE
from interp.saes.sae import SAE

SITE = "blocks.0.hook_resid_pre"
BOS, RED, BLUE = 0, 7, 8


@pytest.fixture(scope="module")
def model() -> interp.Model:
    return interp.zoo.load("ioi_small")


def texts(n: int, token_of: dict[str, int], seed: int = 0) -> tuple[list[list[int]], list[str]]:
    """Random texts of three lengths; each holds the token of its class in one place."""
    random = np.random.default_rng(seed)
    found, labels = [], []
    for row in range(n):
        label = list(token_of)[row % len(token_of)]
        text = random.integers(10, 50, size=5 + row % 3).tolist()
        text[1 + row % 4] = token_of[label]
        found.append([BOS, *text])
        labels.append(label)
    return found, labels


def planted(model: interp.Model, columns: dict[int, int], d_sae: int = 30) -> SAE:
    """Features that fire at one token each, among random ones that hardly differ between texts."""
    sae = ReLUSAE(64, d_sae, site=SITE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(64, d_sae, generator=generator) / 100)
        for feature, token in columns.items():
            others = torch.cat([model.W_E[:token], model.W_E[token + 1 :]])
            # A direction on which that token alone lies: 10 there, 0 at all others, to least squares.
            targets = torch.cat([torch.zeros(len(others)), torch.tensor([10.0])])
            rows = torch.cat([others, model.W_E[token][None]])
            sae.W_enc[:, feature] = torch.linalg.lstsq(rows, targets[:, None]).solution[:, 0]
    return sae


def test_a_planted_feature_is_found_and_is_enough(model: interp.Model) -> None:
    sae = planted(model, {11: RED})
    prompts, labels = texts(80, {"blue": BLUE, "red": RED})
    found = sparse_probing(model, sae, prompts, labels, k=(1, 3))
    assert found["class"].values.tolist() == ["red"]
    assert found["feature"].values[0, 0] == 11
    assert found["mean_difference"].values[0, 0] > 0.5
    values = found["accuracy"].sel({"class": "red", "statistic": "value"})
    assert float(values.sel(probe="k=1")) == 1
    assert found["chance"].values == pytest.approx([0.5])
    assert (found.attrs["n_train"], found.attrs["n_test"]) == (60, 20)


def test_intervals_are_wilsons(model: interp.Model) -> None:
    prompts, labels = texts(80, {"blue": BLUE, "red": RED})
    found = sparse_probing(model, planted(model, {11: RED}), prompts, labels, k=(1,), level=0.9)
    value, low, high = found["accuracy"].sel({"class": "red", "probe": "k=1"}).values
    z = norm.ppf(0.95)
    middle, half = value + z**2 / 40, z * np.sqrt(value * (1 - value) / 20 + z**2 / 1600)
    assert [low, high] == pytest.approx([(middle - half) / (1 + z**2 / 20), (middle + half) / (1 + z**2 / 20)])


def test_the_mean_difference_is_that_of_the_training_texts(model: interp.Model) -> None:
    """All texts of a class are the same, so that the split does not matter."""
    red, blue = [BOS, 12, RED, 30], [BOS, BLUE, 15]
    sae = planted(model, {4: RED, 9: BLUE})
    found = sparse_probing(model, sae, [red, blue] * 6, ["red", "blue"] * 6, k=(2,), first=1)

    def pooled(text: list[int]) -> Tensor:
        _, cache = model.run_with_cache([text], SITE)
        return sae.encode(cache[SITE])[0, 1:].mean(0)

    expected = (pooled(red) - pooled(blue)).detach()
    best = found["feature"].values[0]
    assert set(best) == {4, 9}
    assert found["mean_difference"].values[0] == pytest.approx(expected[best].numpy(), rel=1e-4)


def test_more_classes_are_each_told_from_the_others_and_labels_may_be_anything(model: interp.Model) -> None:
    sae = planted(model, {11: RED, 12: BLUE, 13: 9})
    prompts, labels = texts(90, {1: RED, 2: BLUE, 3: 9})  # type: ignore[dict-item]
    found = sparse_probing(model, sae, prompts, labels, k=(1,))
    assert found["class"].values.tolist() == ["1", "2", "3"]
    assert found["feature"].values[:, 0].tolist() == [11, 12, 13]
    assert (found["accuracy"].sel(probe="k=1", statistic="value") == 1).all()
    assert found["chance"].values == pytest.approx([2 / 3] * 3, abs=0.03)


def test_without_signal_probes_are_near_chance_and_the_seed_reproduces(model: interp.Model) -> None:
    prompts, labels = texts(80, {"blue": BLUE, "red": BLUE})
    sae = planted(model, {})
    first, again, other = (sparse_probing(model, sae, prompts, labels, k=(1,), seed=seed) for seed in (0, 0, 1))
    assert first["accuracy"].equals(again["accuracy"])
    assert not first["mean_difference"].equals(other["mean_difference"])
    for values in (first["accuracy"], other["accuracy"]):
        assert (values.sel(statistic="low") < 0.5).all()
        assert (values.sel(statistic="high") > 0.5).all()


def test_batches_do_not_matter(model: interp.Model, tmp_path) -> None:
    prompts, labels = texts(40, {"blue": BLUE, "red": RED})
    sae = planted(model, {11: RED})
    one, many = (sparse_probing(model, sae, prompts, labels, batch_size=size) for size in (1, 50))
    assert one["feature"].equals(many["feature"])
    np.testing.assert_allclose(one["mean_difference"], many["mean_difference"], rtol=1e-4, atol=1e-6)
    one.to_netcdf(tmp_path / "probing.nc", engine="h5netcdf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["a"] * 7}, "8 texts have 7 labels"),
        ({"labels": ["a"] * 8}, "one class only"),
        ({"labels": ["a"] * 6 + ["b"] * 2}, "class 'b' has 2 texts; a class needs 4"),
        ({"k": (31,)}, r"k=\(31,\): numbers of features run 1..30"),
        ({"k": ()}, "numbers of features run 1..30"),
        ({"test_share": 1.0}, "test_share is 1.0"),
        ({"test_share": 0.1}, "test_size = 1 should be greater or equal to the number of classes = 2"),
        ({"regularisation": 0.0}, "regularisation=0.0 must be more than 0"),
        ({"level": 95.0}, "level is 95"),
        ({"first": 6}, "first=6 leaves nothing of text 0, of 6 tokens"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_run(
    model: interp.Model, change: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interp.saes.probing.gather", None)
    prompts, labels = texts(8, {"blue": BLUE, "red": RED})
    arguments = {"labels": labels, **change}
    with pytest.raises(ValueError, match=message):
        sparse_probing(model, planted(model, {}), prompts, **arguments)
