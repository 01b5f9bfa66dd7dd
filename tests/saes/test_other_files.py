"""dictionary_learning, sparsify, Gemma Scope and attention-output files against formulas written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp import saes
from tests.saes.random_saes import D_IN, D_SAE, assert_same_function, random_sae, vectors


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_attention_output(folder: Path, name: str = "gpt2_L5", **settings: Any) -> dict[str, Tensor]:
    content = {
        "act_size": D_IN,
        "dict_size": D_SAE,
        "act_name": "blocks.5.attn.hook_z",
        "layer": 5,
        "model_name": "gpt2-small",
        "seq_len": 128,
        "enc_dtype": "fp32",
        "concat_heads": True,
        **settings,
    }
    weights = tensors()
    torch.save(weights, folder / f"{name}.pt")
    (folder / f"{name}_cfg.json").write_text(json.dumps(content))
    return weights


@pytest.mark.parametrize("act_name", ["blocks.5.attn.hook_z", "hook_z", "z"])
def test_attention_output(act_name: str, tmp_path: Path) -> None:
    """The heads' outputs concatenated, head by head; b_dec subtracted."""
    w = write_attention_output(tmp_path, act_name=act_name)
    sae = saes.load(tmp_path)
    z = vectors().reshape(1, 64, 3, 2)
    rows = saes.to_rows(sae.site or "", z)
    features = ((vectors() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    assert sae.site == "blocks.5.attn.hook_z"
    assert sae.metadata == {"source_format": "attention_output", "model_name": "gpt2-small", "context_size": 128}
    torch.testing.assert_close(sae.encode(rows)[0], features, atol=1e-5, rtol=0)
    output = saes.from_rows("blocks.5.attn.hook_z", sae(rows), z)
    torch.testing.assert_close(output.reshape(64, D_IN), features @ w["W_dec"] + w["b_dec"], atol=1e-5, rtol=0)


def test_several_attention_output_saes_in_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_attention_output(tmp_path, name)
    with pytest.raises(ValueError, match=r"several SAEs or none \(a\.pt, b\.pt\); give the path of one"):
        saes.load(tmp_path)
    assert saes.load(tmp_path / "b.pt").d_sae == D_SAE
    saes.convert(tmp_path / "a.pt", tmp_path / "ours")
    assert_same_function(saes.load(tmp_path / "ours"), saes.load(tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("act_size", None, r"field 'act_size' is missing"),
        ("act_size", 7, r"tensor 'W_enc' has shape \(6, 10\); \(7, 10\) was expected"),
        ("act_name", "hook_y", r"field 'act_name': 'hook_y' is not a site"),
    ],
)
def test_attention_output_settings_are_checked(field: str, value: Any, said: str, tmp_path: Path) -> None:
    write_attention_output(tmp_path, **{field: value})
    with pytest.raises(ValueError, match=said):
        saes.load(tmp_path)


def test_single_heads_are_refused(tmp_path: Path) -> None:
    write_attention_output(tmp_path, concat_heads=False)
    with pytest.raises(NotImplementedError, match="field 'concat_heads' is false"):
        saes.load(tmp_path)


@pytest.mark.parametrize(
    ("place", "site", "target", "model"),
    [
        ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", "blocks.20.hook_resid_post", None, "gemma-2-2b"),
        ("gemma-scope-9b-it-res/layer_9/width_16k/average_l0_14", "blocks.9.hook_resid_post", None, "gemma-2-9b-it"),
        ("models--google--gemma-scope-2b-pt-att/snapshots/1/layer_0/x", "blocks.0.attn.hook_z", None, "gemma-2-2b"),
        ("gemma-scope-2b-pt-mlp/layer_5/x", "blocks.5.hook_mlp_out", None, "gemma-2-2b"),
        (
            "gemma-scope-2b-pt-transcoders/layer_5/x",
            "blocks.5.ln2.hook_normalized",
            "blocks.5.hook_mlp_out",
            "gemma-2-2b",
        ),
        ("elsewhere", None, None, None),
    ],
)
def test_gemma_scope(place: str, site: str | None, target: str | None, model: str | None, tmp_path: Path) -> None:
    """Nothing is subtracted from the input; model and site are in the path; names may be written in small letters."""
    w, threshold = tensors(), torch.linspace(0.1, 2, D_SAE)
    folder = tmp_path / place
    folder.mkdir(parents=True)
    stored = {name.lower() if site is None else name: one.numpy() for name, one in w.items()}
    np.savez(folder / "params.npz", threshold=threshold.numpy(), **stored)
    sae = saes.load(folder)
    pre_activations = vectors() @ w["W_enc"] + w["b_enc"]
    features = pre_activations * (pre_activations > threshold)
    torch.testing.assert_close(sae.encode(vectors()), features, atol=1e-5, rtol=0)
    torch.testing.assert_close(sae(vectors()), features @ w["W_dec"] + w["b_dec"], atol=1e-5, rtol=0)
    assert (sae.site, sae.target_site, sae.metadata.get("model_name")) == (site, target, model)


def test_gemma_scope_of_the_embedding(tmp_path: Path) -> None:
    """Trained on rows e of the table; the first block reads e * sqrt(d_model), which is what `hook_embed` is."""
    w, threshold = tensors(), torch.linspace(0.1, 2, D_SAE)
    folder = tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", threshold=threshold.numpy(), **{name: one.numpy() for name, one in w.items()})
    sae = saes.load(folder / "params.npz")
    pre_activations = vectors() @ w["W_enc"] + w["b_enc"]
    features = pre_activations * (pre_activations > threshold)
    root = D_IN**0.5
    assert sae.site == "hook_embed"
    torch.testing.assert_close(sae.encode(vectors() * root), features, atol=1e-5, rtol=0)
    torch.testing.assert_close(sae(vectors() * root), (features @ w["W_dec"] + w["b_dec"]) * root, atol=2e-5, rtol=0)
    again = tmp_path / "again" / "gemma-scope-2b-pt-res" / "embedding"
    saes.save(sae, again, format="gemma_scope")
    with np.load(again / "params.npz") as arrays:
        np.testing.assert_allclose(arrays["W_enc"], w["W_enc"], atol=1e-6)
        np.testing.assert_allclose(arrays["b_dec"], w["b_dec"], atol=1e-6)


def test_dictionary_learning_normalises_an_auto_encoder(tmp_path: Path) -> None:
    """As its own loader does: the same output, features multiplied by the decoder norms."""
    w = tensors()
    state = {
        "bias": w["b_dec"],
        "encoder.weight": w["W_enc"].T.contiguous(),
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
    }
    torch.save(state, tmp_path / "ae.pt")
    sae = saes.load(tmp_path)
    features = ((vectors() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    torch.testing.assert_close(sae.encode(vectors()), features * w["W_dec"].norm(dim=-1), atol=2e-5, rtol=0)
    torch.testing.assert_close(sae(vectors()), features @ w["W_dec"] + w["b_dec"], atol=2e-5, rtol=0)


def test_dictionary_learning_writes_a_class_that_keeps_features(tmp_path: Path) -> None:
    long = random_sae("relu")
    unit = saes.fold_decoder_norm(long)
    for name, sae, kind in (("long", long, "AutoEncoderNew"), ("unit", unit, "AutoEncoder")):
        saes.save(sae, tmp_path / name, format="dictionary_learning")
        settings = json.loads((tmp_path / name / "config.json").read_text())
        assert settings["trainer"]["dict_class"] == kind
        assert_same_function(saes.load(tmp_path / name), sae)


def test_dictionary_learning_top_k_ignores_its_threshold_and_batch_top_k_does_not(tmp_path: Path) -> None:
    for architecture, used in (("topk", False), ("batch_topk", True)):
        sae = random_sae(architecture)
        saes.save(sae, tmp_path, format="dictionary_learning")
        state = torch.load(tmp_path / "ae.pt", weights_only=True)
        torch.save({**state, "threshold": torch.tensor(4.0)}, tmp_path / "ae.pt")
        features = saes.load(tmp_path).encode(vectors())
        assert torch.equal(features, sae.encode(vectors())) != used
        if used:
            pre_activations = sae.pre_activations(vectors())
            torch.testing.assert_close(features, pre_activations * (pre_activations > 4), atol=1e-5, rtol=0)
        (tmp_path / "config.json").unlink()
        with pytest.raises(ValueError, match="its tensors do not say which class it is"):
            saes.load(tmp_path)


@pytest.mark.parametrize("architecture", ["gated", "jumprelu", "matryoshka", "relu"])
def test_dictionary_learning_without_settings(architecture: str, tmp_path: Path) -> None:
    sae = random_sae(architecture)
    saes.save(sae, tmp_path, format="dictionary_learning")
    (tmp_path / "config.json").unlink()
    assert_same_function(saes.load(tmp_path), sae)


def test_dictionary_learning_checkpoints_have_their_settings_above(tmp_path: Path) -> None:
    sae = random_sae("topk", site="blocks.7.hook_resid_post", metadata={"model_name": "tiny"})
    saes.save(sae, tmp_path, format="dictionary_learning")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "ae.pt").rename(tmp_path / "checkpoints" / "ae_100.pt")
    loaded = saes.load(tmp_path / "checkpoints" / "ae_100.pt")
    assert_same_function(loaded, sae)
    assert loaded.site == sae.site
    assert loaded.metadata["model_name"] == "tiny"


def test_dictionary_learning_classes_that_are_not_known(tmp_path: Path) -> None:
    saes.save(random_sae("topk"), tmp_path, format="dictionary_learning")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "CrossCoder"}}))
    with pytest.raises(NotImplementedError, match="dict_class 'CrossCoder' is not one of AutoEncoder, "):
        saes.load(tmp_path)


@pytest.mark.parametrize(("sizes", "said"), [([3, 3], "must add up to 10"), ([10, 0], "must add up to 10")])
def test_groups_of_a_matryoshka(sizes: list[int], said: str, tmp_path: Path) -> None:
    saes.save(random_sae("matryoshka"), tmp_path, format="dictionary_learning")
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    assert state["group_sizes"].tolist() == [4, 6]
    torch.save({**state, "group_sizes": torch.tensor(sizes)}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match=rf"ae\.pt: tensor 'group_sizes' .* {said}"):
        saes.load(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("activation", "groupmax"), ("signed", True)])
def test_sparsify_activations_that_are_not_top_k(field: str, value: Any, tmp_path: Path) -> None:
    saes.save(random_sae("topk"), tmp_path, format="sparsify")
    settings = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**settings, field: value}))
    with pytest.raises(NotImplementedError, match=f"field '{field}'"):
        saes.load(tmp_path)


def test_sparsify_subtracts_unless_it_transcodes(tmp_path: Path) -> None:
    """Whatever `normalize_decoder` says; its decoder is stored [d_sae, d_in]."""
    w = tensors()
    for transcode in (False, True):
        saes.save(random_sae("topk", k=3), tmp_path, format="sparsify")
        state = {"W_dec": w["W_dec"], "b_dec": w["b_dec"], "encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"]}
        saes.weight_files.write_weights(tmp_path / "sae.safetensors", state)
        # As written by older versions: 0 latents stands for a factor, which need not be there otherwise.
        settings = {"d_in": D_IN, "k": 3, "num_latents": D_SAE, "normalize_decoder": True, "transcode": transcode}
        (tmp_path / "cfg.json").write_text(json.dumps(settings))
        pre_activations = (vectors() - w["b_dec"] * (not transcode)) @ w["W_enc"] + w["b_enc"]
        values, indices = pre_activations.relu().topk(3)
        features = torch.zeros(64, D_SAE).scatter(-1, indices, values)
        sae = saes.load(tmp_path)
        torch.testing.assert_close(sae.encode(vectors()), features, atol=1e-5, rtol=0)
        torch.testing.assert_close(sae(vectors()), features @ w["W_dec"] + w["b_dec"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("module", "site"),
    [
        ("layers.7", "blocks.7.hook_resid_post"),
        ("model.layers.7.self_attn", "blocks.7.hook_attn_out"),
        ("transformer.h.7.mlp", "blocks.7.hook_mlp_out"),
        ("embed_tokens", "hook_embed"),
        ("transformer.wte", None),
        ("layers.7.mlp.act", None),
        ("something", None),
    ],
)
def test_sites_of_modules(module: str, site: str | None, tmp_path: Path) -> None:
    saes.save(random_sae("topk"), tmp_path / module, format="sparsify")
    sae = saes.load(tmp_path / module)
    assert sae.site == site
    assert sae.metadata["hookpoint"] == module
