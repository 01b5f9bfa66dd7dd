"""SAELens's settings, flat and nested, against formulas written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp import saes
from tests.saes.random_saes import D_IN, D_SAE, random_sae, vectors

FLAT = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "model_name": "gpt2-small", "context_size": 128}


def weights(*, gated: bool = False, **more: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    shapes |= dict.fromkeys(("b_gate", "b_mag", "r_mag") if gated else ("b_enc",), (D_SAE,))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | more


def write(folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def nested(**settings: Any) -> dict[str, Any]:
    metadata = {"hook_name": "blocks.1.hook_resid_pre", "sae_lens_version": "6.1.0", "model_name": "gpt2-small"}
    return {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "metadata": metadata, **settings}


def affine(w: dict[str, Tensor], x: Tensor, *, subtract: bool = True) -> Tensor:
    return (x - w["b_dec"] * subtract) @ w["W_enc"] + w["b_enc"]


def assert_computes(sae: saes.SAE, features: Tensor, output: Tensor, atol: float = 1e-5) -> None:
    assert 0.05 < float((features > 0).float().mean()) < 0.95
    torch.testing.assert_close(sae.encode(vectors()), features, atol=atol, rtol=0)
    torch.testing.assert_close(sae(vectors()), output, atol=atol, rtol=0)


def test_the_oldest_flat_settings(tmp_path: Path) -> None:
    """No architecture, no word on b_dec: ReLU, and b_dec is subtracted."""
    w = weights()
    settings = {**FLAT, "hook_point": "blocks.4.attn.hook_z", "hook_point_layer": 4, "hook_point_head_index": None}
    sae = saes.load(write(tmp_path, settings, w))
    features = affine(w, vectors()).relu()
    assert_computes(sae, features, features @ w["W_dec"] + w["b_dec"])
    assert sae.site == "blocks.4.attn.hook_z"
    assert sae.metadata["model_name"] == "gpt2-small"
    assert sae.metadata["context_size"] == 128


def test_flat_settings_that_do_not_subtract(tmp_path: Path) -> None:
    w = weights()
    settings = {
        **FLAT,
        "hook_name": "blocks.4.hook_resid_pre",
        "apply_b_dec_to_input": False,
        "architecture": "standard",
    }
    features = affine(w, vectors(), subtract=False).relu()
    assert_computes(saes.load(write(tmp_path, settings, w)), features, features @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("architecture", [None, "standard", "topk"])
def test_flat_top_k(architecture: str | None, tmp_path: Path) -> None:
    """k stood in the activation function's arguments; top-k comes before the ReLU, so fewer than k may be active."""
    w = weights()
    settings = {**FLAT, "hook_name": "hook_embed", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}}
    sae = saes.load(write(tmp_path, settings | ({"architecture": architecture} if architecture else {}), w))
    pre_activations = affine(w, vectors())
    kth = pre_activations.sort(-1, descending=True).values[:, 6:7]
    features = torch.where(pre_activations >= kth, pre_activations, 0).relu()
    assert (features > 0).sum(-1).unique().tolist()[0] < 7
    assert_computes(sae, features, features @ w["W_dec"] + w["b_dec"])
    assert isinstance(sae, saes.ARCHITECTURES["topk"])


def test_flat_gated(tmp_path: Path) -> None:
    w = weights(gated=True)
    x = vectors() - w["b_dec"]
    open_gate = x @ w["W_enc"] + w["b_gate"] > 0
    features = open_gate * (x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
    sae = saes.load(write(tmp_path, {**FLAT, "hook_name": "hook_embed", "architecture": "gated"}, w))
    assert_computes(sae, features, features @ w["W_dec"] + w["b_dec"], atol=2e-5)


def test_finetuning_scales_features_before_decoding_only(tmp_path: Path) -> None:
    factor = torch.linspace(0.5, 2, D_SAE)
    w = weights(scaling_factor=factor)
    settings = {**FLAT, "hook_name": "hook_embed", "finetuning_scaling_factor": True}
    features = affine(w, vectors()).relu()
    sae = saes.load(write(tmp_path, settings, w))
    assert_computes(sae, features, (features * factor) @ w["W_dec"] + w["b_dec"])


def test_scaling_factors_of_one_are_nothing_and_others_must_be_announced(tmp_path: Path) -> None:
    settings = {**FLAT, "hook_name": "hook_embed", "finetuning_scaling_factor": False}
    w = weights(scaling_factor=torch.ones(D_SAE))
    features = affine(w, vectors()).relu()
    assert_computes(saes.load(write(tmp_path, settings, w)), features, features @ w["W_dec"] + w["b_dec"])
    with pytest.raises(ValueError, match="tensor 'scaling_factor' is not 1"):
        saes.load(write(tmp_path, settings, weights(scaling_factor=torch.full((D_SAE,), 2.0))))


def test_logarithms_of_thresholds(tmp_path: Path) -> None:
    """Training checkpoints of old JumpReLU."""
    threshold = torch.linspace(0.1, 2, D_SAE)
    w = weights(log_threshold=threshold.log())
    pre_activations = affine(w, vectors())
    features = pre_activations * (pre_activations > threshold)
    sae = saes.load(write(tmp_path, nested(architecture="jumprelu"), w))
    assert_computes(sae, features, features @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("apply", [True, False])
def test_negative_thresholds_are_zero(apply: bool, tmp_path: Path) -> None:
    w = weights(threshold=torch.full((D_SAE,), -1.0))
    features = affine(w, vectors(), subtract=apply).relu()
    sae = saes.load(write(tmp_path, nested(architecture="jumprelu", apply_b_dec_to_input=apply), w))
    assert_computes(sae, features, features @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("rescaled", [True, False])
def test_top_k_of_rescaled_activations(rescaled: bool, tmp_path: Path) -> None:
    """Selected by pre-activation times decoder norm, which decoding divides by again."""
    w = weights()
    norms = w["W_dec"].norm(dim=-1) if rescaled else torch.ones(D_SAE)
    values, indices = (affine(w, vectors()) * norms).topk(3)
    features = torch.zeros(len(vectors()), D_SAE).scatter(-1, indices, values.relu())
    sae = saes.load(write(tmp_path, nested(architecture="topk", k=3, rescale_acts_by_decoder_norm=rescaled), w))
    assert_computes(sae, features, (features / norms) @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_checkpoints_of_batch_top_k(architecture: str, tmp_path: Path) -> None:
    """The threshold is in units of rescaled activations, so that folding the norms leaves it."""
    w = weights(topk_threshold=torch.tensor(1.3, dtype=torch.float64))
    settings = nested(architecture=architecture, k=3.0, rescale_acts_by_decoder_norm=True, matryoshka_widths=[4])
    sae = saes.load(write(tmp_path, settings, w))
    norms = w["W_dec"].norm(dim=-1)
    rescaled = affine(w, vectors()).relu() * norms
    features = rescaled * (rescaled > 1.3)
    assert_computes(sae, features, (features / norms) @ w["W_dec"] + w["b_dec"])
    assert sae.settings()["k"] == 3
    assert sae.settings().get("widths", [4, D_SAE]) == [4, D_SAE]


@pytest.mark.parametrize("flat", [True, False])
def test_expected_average_scale(flat: bool, tmp_path: Path) -> None:
    """Trained on c * x: the encoder gets c, the decoder and its bias 1 / c; without c it is refused."""
    w, c = weights(), 0.4
    mode: dict[str, Any] = {"normalize_activations": True if flat else "expected_average_only_in"}
    write(tmp_path, {**FLAT, "hook_name": "hook_embed", **mode} if flat else nested(**mode), w)
    with pytest.raises(
        NotImplementedError, match=r"cfg\.json: field 'normalize_activations' .* activation_scaler\.json"
    ):
        saes.load(tmp_path)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": c}))
    features = affine(w, c * vectors()).relu()
    assert_computes(saes.load(tmp_path), features, (features @ w["W_dec"] + w["b_dec"]) / c, atol=2e-5)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": -1}))
    with pytest.raises(ValueError, match=r"activation_scaler\.json: field 'scaling_factor' is -1"):
        saes.load(tmp_path)


@pytest.mark.parametrize("apply", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_whitening(gated: bool, apply: bool, tmp_path: Path) -> None:
    """Trained on (x - mean) @ M, mapped back by the inverse."""
    w = weights(gated=gated)
    mean = torch.linspace(-1, 1, D_IN, dtype=torch.float64)
    matrix = torch.eye(D_IN, dtype=torch.float64) + 0.3 * vectors(D_IN, seed=7).double()
    whitening = {"mean": mean, "matrix": matrix, "inverse_matrix": torch.linalg.inv(matrix).contiguous()}
    settings = nested(apply_b_dec_to_input=apply, normalize_activations="covariance_whitening")
    write(tmp_path, settings | ({"architecture": "gated"} if gated else {}), w)
    with pytest.raises(
        NotImplementedError, match=r"'covariance_whitening', and activation_whitening\.safetensors is not"
    ):
        saes.load(tmp_path)
    save_file(whitening, tmp_path / "activation_whitening.safetensors")
    sae = saes.load(tmp_path)
    plain = saes.ARCHITECTURES["gated" if gated else "relu"](D_IN, D_SAE, apply_b_dec_to_input=apply)
    plain.load_state_dict(w)
    white = ((vectors().double() - mean) @ matrix).float()
    output = (plain(white).double() @ whitening["inverse_matrix"] + mean).float()
    assert_computes(sae, plain.encode(white), output, atol=5e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (nested(normalize_activations="layer_norm"), "'layer_norm': a scale for each token cannot be folded"),
        (nested(normalize_activations="constant_norm_rescale"), "'constant_norm_rescale': a scale for each token"),
        (nested(architecture="temporal"), "field 'architecture' is 'temporal', which has no equal here"),
        (nested(architecture="batchtopk", k=2.5), "field 'k' is 2.5; only whole numbers"),
        (nested(metadata={"hook_head_index": 3}), "field 'metadata.hook_head_index' is 3"),
        ({**FLAT, "activation_fn_str": "tanh-relu"}, "field 'activation_fn' is 'tanh-relu'"),
        ({**FLAT, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2, "signed": True}}, "signed' is true"),
    ],
)
def test_what_has_no_equal_here_is_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    tensors = weights(**({"topk_threshold": torch.ones(())} if settings.get("architecture") == "batchtopk" else {}))
    with pytest.raises(NotImplementedError, match=r"cfg\.json: ") as error:
        saes.load(write(tmp_path, settings, tensors))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_skip_connections_are_transposed(tmp_path: Path) -> None:
    skip = vectors(4)
    w = {**weights(), "W_dec": vectors(D_SAE, width=4), "b_dec": torch.arange(4.0), "W_skip": skip}
    sae = saes.load(write(tmp_path, nested(architecture="skip_transcoder", d_out=4), w))
    features = (vectors() @ w["W_enc"] + w["b_enc"]).relu()
    assert_computes(sae, features, features @ w["W_dec"] + w["b_dec"] + vectors() @ skip.T)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("relu", "standard"), ("batch_topk", "jumprelu"), ("matryoshka", "jumprelu"), ("topk", "topk")],
)
def test_what_is_written(architecture: str, name: str, tmp_path: Path) -> None:
    """Fields that SAELens goes by; a threshold for every feature where there was one for all."""
    sae = random_sae(architecture, site="blocks.3.attn.hook_z", metadata={"model_name": "tiny"})
    saes.save(sae, tmp_path)
    settings = json.loads((tmp_path / "cfg.json").read_text())
    assert (settings["architecture"], settings["reshape_activations"]) == (name, "hook_z")
    assert settings["metadata"]["hook_name"] == "blocks.3.attn.hook_z"
    assert settings["metadata"]["sae_lens_version"].split(".")[0] == "6"
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert tensors["W_enc"].shape == (D_IN, D_SAE)
    assert ("threshold" in tensors) == (name == "jumprelu")
    if name == "jumprelu":
        assert torch.equal(tensors["threshold"], sae.state_dict()["threshold"].expand(D_SAE))


def test_the_model_is_named_as_sae_lens_does(tmp_path: Path) -> None:
    """Training notes "model", like every result here."""
    sae = random_sae("relu", metadata={"model": "tiny"})
    saes.save(sae, tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["metadata"]["model_name"] == "tiny"
    assert saes.load(tmp_path).metadata == {"model": "tiny"}


@pytest.mark.parametrize(
    ("architecture", "skip", "name"),
    [
        ("relu", False, "transcoder"),
        ("relu", True, "skip_transcoder"),
        ("batch_topk", False, "jumprelu_transcoder"),
        ("jumprelu", True, "jumprelu_skip_transcoder"),
        ("topk", False, "topk_transcoder"),
        ("gated", True, "gated_skip_transcoder"),
    ],
)
def test_names_of_transcoders(architecture: str, skip: bool, name: str, tmp_path: Path) -> None:
    saes.save(random_sae(architecture, d_out=4, skip=skip, apply_b_dec_to_input=False), tmp_path)
    settings = json.loads((tmp_path / "cfg.json").read_text())
    assert (settings["architecture"], settings["d_out"], settings["apply_b_dec_to_input"]) == (name, 4, False)
    assert load_file(tmp_path / "sae_weights.safetensors").get("W_skip", torch.zeros(4, D_IN)).shape == (4, D_IN)
