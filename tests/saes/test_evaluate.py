import sys

import numpy as np
import pytest
import torch
from torch import Tensor

import interp
from interp.saes.evaluate import RUNS, describe_evaluation, draw_evaluation, evaluate
from interp.saes.reconstruction import FORMULAS, ReconstructionSums
from interp.saes.relu import ReLUSAE
from interp.saes.sae import SAE
from tests.model.families import FAMILIES

SITE = "blocks.1.attn.hook_z"


@pytest.fixture(scope="module")
def ioi() -> tuple[interp.Model, Tensor]:
    return interp.zoo.load("ioi_small"), interp.zoo.task("ioi_small").clean[:7]


def random_sae(d_in: int, d_sae: int = 40, *, d_out: int | None = None, **sites: str) -> SAE:
    sae = ReLUSAE(d_in, d_sae, d_out=d_out, apply_b_dec_to_input="target_site" not in sites, **sites)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 6)
        sae.b_enc[:5] = -50  # never active
    return sae


def identity_sae(d_in: int, site: str = SITE) -> SAE:
    """Positive and negative part of every coordinate."""
    sae = ReLUSAE(d_in, 2 * d_in, site=site)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(d_in), -torch.eye(d_in)], dim=1))
        sae.W_dec.copy_(sae.W_enc.T)
    return sae


def cross_entropy(logits: Tensor, tokens: Tensor, kept: Tensor) -> float:
    losses = -logits.double().log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    return float(losses[kept[:, :-1]].mean())


def divergence(clean: Tensor, logits: Tensor, kept: Tensor) -> float:
    own, other = clean.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((own.exp() * (own - other)).sum(-1)[:, :-1][kept[:, :-1]].mean())


def by_hand(model: interp.Model, sae: SAE, tokens: Tensor, kept: Tensor) -> dict[str, float | list[float]]:
    """The numbers of `evaluate` from all activations at once, and from edits of the same values."""
    source, target = sae.site, sae.target_site or sae.site
    clean, cache = model.run_with_cache(tokens, [source, target])
    with torch.no_grad():
        features = sae.encode(cache[source].flatten(2) if cache[source].dim() == 4 else cache[source])
        found = sae.decode(features)
    own = cache[target]
    shape = (*kept.shape, *[1] * (own.dim() - 2))
    mean = own[kept].double().mean(0).float()
    ce, kl = [], []
    for new in (own, found.reshape(own.shape), torch.zeros_like(own), mean.expand_as(own)):
        with model.edited(interp.Edit(target, value=torch.where(kept.reshape(shape), new, own))):
            logits = model(tokens)
        ce.append(cross_entropy(logits, tokens, kept))
        kl.append(divergence(clean, logits, kept))
    x, y = own[kept].flatten(1).double().numpy(), found[kept].double().numpy()
    active = (features[kept] > 0).numpy()
    return {
        "ce": ce,
        "kl": kl,
        "ce_recovered": [(ce[at] - ce[1]) / (ce[at] - ce[0]) if ce[at] > ce[0] else np.nan for at in (2, 3)],
        "kl_recovered": [1 - kl[1] / kl[at] for at in (2, 3)],
        "squared_error": ((x - y) ** 2).sum(1).mean(),
        "explained_variance": 1 - ((x - y) ** 2).sum(1).mean() / ((x - x.mean(0)) ** 2).sum(1).mean(),
        "fraction_of_variance_explained": 1 - np.var(x - y, axis=0).sum() / np.var(x, axis=0).sum(),
        "cosine": np.mean([a @ b / np.sqrt(a @ a * (b @ b)) for a, b in zip(x, y, strict=True)]),
        "l2_ratio": np.mean(np.sqrt((y**2).sum(1) / (x**2).sum(1))),
        "relative_reconstruction_bias": (y**2).sum(1).mean() / (x * y).sum(1).mean(),
        "l0": active.sum(1).mean(),
        "l1": features[kept].double().sum(1).mean().item(),
        "dead_share": (active.sum(0) == 0).mean(),
        "firing_rate": active.mean(0),
    }


def check(model: interp.Model, sae: SAE, tokens: Tensor, exclude: Tensor | None, batch_size: int) -> None:
    kept = torch.ones_like(tokens, dtype=torch.bool) if exclude is None else ~exclude
    found = evaluate(model, sae, tokens, exclude=exclude, batch_size=batch_size)
    for name, expected in by_hand(model, sae, tokens, kept).items():
        np.testing.assert_allclose(found[name].values, expected, rtol=2e-4, atol=1e-6, err_msg=name)
    assert found["density"].sum() + (found["firing_rate"] == 0).sum() == sae.d_sae
    assert found.attrs["n_tokens"] == int(kept.sum())
    assert found.attrs["n_excluded"] == int((~kept).sum())
    assert found.attrs["n_predictions"] == int(kept[:, :-1].sum())


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_numbers_are_those_of_all_activations_at_once(ioi, batch_size: int) -> None:
    model, tokens = ioi
    check(model, random_sae(64, site=SITE), tokens, None, batch_size)


def test_excluded_tokens_count_in_nothing(ioi) -> None:
    model, tokens = ioi
    exclude = torch.zeros_like(tokens, dtype=torch.bool)
    exclude[:, 0] = exclude[2, 5:] = exclude[4] = True
    check(model, random_sae(64, site=SITE), tokens, exclude, 2)
    found = evaluate(model, random_sae(64, site=SITE), tokens, exclude=exclude)
    assert found["prompt_ce"].isnull().values.tolist() == [[row == 4 for row in range(7)]] * len(RUNS)


@pytest.mark.parametrize(
    ("source", "target", "d_in", "d_out"),
    [
        ("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out", 32, 32),
        ("blocks.0.hook_resid_mid", "blocks.1.attn.hook_z", 32, 48),
    ],
)
def test_a_transcoder_is_measured_on_its_target(source: str, target: str, d_in: int, d_out: int) -> None:
    model = interp.Model(FAMILIES["llama"].make_model())
    tokens = torch.randint(3, 61, (4, 8), generator=torch.Generator().manual_seed(0))
    check(model, random_sae(d_in, d_out=d_out, site=source, target_site=target), tokens, None, 3)


@pytest.mark.parametrize("site", ["blocks.1.attn.hook_z", "blocks.0.hook_resid_post"])
def test_a_perfect_sae_recovers_all_and_a_zero_one_nothing(ioi, site: str) -> None:
    model, tokens = ioi
    perfect = evaluate(model, identity_sae(64, site), tokens)
    assert perfect["ce_recovered"].values == pytest.approx([1, 1], abs=1e-5)
    assert perfect["kl_recovered"].values == pytest.approx([1, 1], abs=1e-5)
    assert [float(perfect[name]) for name in ("explained_variance", "fraction_of_variance_explained")] == [1, 1]
    assert [float(perfect[name]) for name in ("cosine", "l2_ratio", "relative_reconstruction_bias")] == [
        pytest.approx(1)
    ] * 3
    zero = evaluate(model, ReLUSAE(64, 8, site=site), tokens)
    assert zero["ce_recovered"].values[0] == 0
    assert zero["kl_recovered"].values[0] == 0
    assert float(zero["fraction_of_variance_explained"]) == 0
    assert float(zero["explained_variance"]) < 0
    assert float(zero["l2_ratio"]) == 0
    assert np.isnan(zero["cosine"])
    assert np.isnan(zero["relative_reconstruction_bias"])
    assert (float(zero["dead_share"]), float(zero["l0"]), int(zero["density"].sum())) == (1, 0, 0)


def test_the_mean_alone_is_mean_ablation(ioi) -> None:
    model, tokens = ioi
    sae = ReLUSAE(64, 8, site=SITE)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, SITE)
        sae.b_dec.copy_(cache[SITE].flatten(2).double().mean((0, 1)))
    found = evaluate(model, sae, tokens)
    assert float(found["ce_recovered"].sel(reference="mean")) == pytest.approx(0, abs=1e-5)
    assert float(found["explained_variance"]) == pytest.approx(0, abs=1e-6)


def test_an_ablation_that_costs_nothing_leaves_nothing_to_recover(ioi) -> None:
    model, tokens = ioi
    with model.edited(interp.Edit(SITE, value=0.0)):
        preferred = model(tokens[:, :4])[:, -1].argmax(-1, keepdim=True)
    tokens = torch.cat([tokens[:, :4], preferred], dim=1)
    exclude = torch.arange(5).expand(tokens.shape) < 3
    with model.edited(interp.Edit(SITE, positions=[3, 4], value=0.0)):
        zero = cross_entropy(model(tokens), tokens, ~exclude)
    found = evaluate(model, random_sae(64, site=SITE), tokens, exclude=exclude)
    assert float(found["ce"].sel(run="zero")) == pytest.approx(zero, rel=1e-5)
    assert zero < float(found["ce"].sel(run="clean"))
    assert np.isnan(found["ce_recovered"].sel(reference="zero"))
    assert "ce recovered  of zero undefined (it costs nothing)  of mean" in describe_evaluation(found)
    assert "zero ablation costs nothing" in draw_evaluation(found).layout.title.text


def test_a_constant_error_costs_one_definition_and_not_the_other() -> None:
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = ReconstructionSums(6, 3)
    sums.add(x.float(), x.float() + 2, torch.ones(200, 3))
    numbers = sums.numbers()
    assert numbers["fraction_of_variance_explained"] == pytest.approx(1)
    assert numbers["explained_variance"] == pytest.approx(1 - 24 / float(x.var(0, correction=0).sum()), rel=1e-5)


def test_shrinkage_is_seen_by_both_of_its_measures() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    sums = ReconstructionSums(6, 3)
    sums.add(x, 0.8 * x, torch.zeros(50, 3))
    assert sums.numbers()["l2_ratio"] == pytest.approx(0.8)
    assert sums.numbers()["relative_reconstruction_bias"] == pytest.approx(0.8)


def test_what_is_undefined_is_nan() -> None:
    assert all(np.isnan(value) for value in ReconstructionSums(4, 2).numbers().values())
    assert ReconstructionSums(4, 2).firing_rate().isnan().all()
    constant = ReconstructionSums(4, 2)
    constant.add(torch.full((9, 4), 0.1), torch.zeros(9, 4), torch.zeros(9, 2))
    assert np.isnan(constant.numbers()["explained_variance"])
    assert np.isnan(constant.numbers()["fraction_of_variance_explained"])


def test_a_result_survives_a_file_and_says_how_it_was_made(ioi, tmp_path) -> None:
    model, tokens = ioi
    found = evaluate(model, random_sae(64, site=SITE), tokens)
    found.to_netcdf(tmp_path / "evaluation.nc", engine="h5netcdf")
    assert found.attrs["method"] == "evaluate"
    assert (found.attrs["site"], found.attrs["target_site"], found.attrs["sae"]) == (SITE, SITE, "relu SAE")
    text = describe_evaluation(found)
    assert all(f"{run} {float(found['ce'].sel(run=run)):.4f}" in text for run in RUNS)
    assert all(name.replace("_", " ") in text for name in FORMULAS)


def test_the_figure_shows_rates_and_losses(ioi) -> None:
    model, tokens = ioi
    found = evaluate(model, random_sae(64, site=SITE), tokens)
    figure = draw_evaluation(found)
    rates, losses = figure.data
    assert list(rates.y) == found["density"].values.tolist()
    assert list(losses.x) == ["spliced", "zero", "mean"]
    assert list(losses.y) == (found["ce"].values[1:] - found["ce"].values[0]).tolist()
    assert list(losses.text) == [f"{value:.4f}" for value in found["ce"].values[1:]]
    assert f"({found['ce'].values[0]:.4f})" in figure.layout.annotations[1].text
    assert f"{float(found['dead_share']):.1%} of features never fire" in figure.layout.title.text
    assert draw_evaluation(found, title="A title").layout.title.text == "A title"


@pytest.mark.parametrize(
    ("tokens", "exclude", "message"),
    [
        (torch.zeros(3, 1, dtype=torch.long), None, "nothing to predict"),
        (torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool), "leaves no token"),
        (torch.zeros(2, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool), "a bool for each token"),
        (torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4), "a bool for each token"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_measured_is_refused(ioi, tokens: Tensor, exclude: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(ioi[0], random_sae(64, site=SITE), tokens, exclude=exclude)


def test_an_sae_on_another_device_is_refused_before_the_long_passes(ioi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["interp.saes.evaluate"], "_mean", None)
    with pytest.raises(ValueError, match="on meta; move one with"):
        evaluate(ioi[0], random_sae(64, site=SITE).to("meta"), ioi[1])


def test_a_model_without_a_head_has_no_loss() -> None:
    model = interp.Model(FAMILIES["llama"].make_model().model)
    with pytest.raises(ValueError, match="no language-model head"):
        evaluate(model, random_sae(48, site=SITE), torch.zeros(2, 4, dtype=torch.long))
