"""Round trips of every format over what it can hold; recognition; refusals that name file and field."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from interp import saes
from interp.saes import weight_files
from tests.saes.random_saes import D_IN, assert_same_function, random_sae, vectors

ALL = ("relu", "gated", "topk", "batch_topk", "jumprelu", "matryoshka")
SITE = "blocks.2.attn.hook_z"
HELD = {
    "saelens": ALL,
    "dictionary_learning": ALL,
    "sparsify": ("topk",),
    "gemma_scope": ("relu", "batch_topk", "jumprelu", "matryoshka"),
}
ROUND_TRIPS = [(format, architecture) for format, held in HELD.items() for architecture in held]


@pytest.mark.parametrize("subtracted", [True, False])
@pytest.mark.parametrize(("format", "architecture"), ROUND_TRIPS)
def test_round_trip(format: Any, architecture: str, subtracted: bool, tmp_path: Path) -> None:
    sae = random_sae(architecture, apply_b_dec_to_input=subtracted)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}

    assert saes.save(sae, tmp_path / "new" / "sae", format=format) == tmp_path / "new" / "sae"
    loaded = saes.load(tmp_path / "new" / "sae")

    assert_same_function(loaded, sae)
    assert loaded.dtype == torch.float32
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("transcoder", [False, True])
@pytest.mark.parametrize("architecture", ALL)
def test_our_own_layout_gives_back_the_same_object(architecture: str, transcoder: bool, tmp_path: Path) -> None:
    other: dict[str, Any] = {
        "d_out": 4,
        "skip": True,
        "apply_b_dec_to_input": False,
        "target_site": "blocks.2.hook_mlp_out",
    }
    sae = random_sae(
        architecture, site=SITE, metadata={"model_name": "tiny", "tokens": 5}, **(other if transcoder else {})
    )
    loaded = saes.load(saes.save(sae, tmp_path))

    assert type(loaded) is type(sae)
    assert loaded.settings() == sae.settings()
    assert (loaded.site, loaded.target_site, loaded.metadata) == (sae.site, sae.target_site, sae.metadata)
    assert loaded.state_dict().keys() == sae.state_dict().keys()
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert_same_function(loaded, sae)


def test_equal_saes_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        saes.save(random_sae("jumprelu"), tmp_path / name)
    assert sorted(os.listdir(tmp_path / "a")) == ["cfg.json", "sae_weights.safetensors"]
    for file in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    saes.save(random_sae("relu"), tmp_path)
    assert {file.stat().st_mode for file in tmp_path.iterdir()} == {(tmp_path / "ordinary").stat().st_mode}


def test_top_k_of_sparsify_with_a_skip_connection(tmp_path: Path) -> None:
    sae = random_sae("topk", skip=True, apply_b_dec_to_input=False)
    loaded = saes.load(saes.save(sae, tmp_path / "layers.1", format="sparsify"))
    assert_same_function(loaded, sae)
    assert torch.equal(loaded.state_dict()["W_skip"], sae.state_dict()["W_skip"])


def test_gemma_scope_holds_transcoders(tmp_path: Path) -> None:
    sae = random_sae("jumprelu", d_out=4, apply_b_dec_to_input=False)
    assert_same_function(saes.load(saes.save(sae, tmp_path, format="gemma_scope")), sae)


@pytest.mark.parametrize(
    ("format", "architecture", "options"),
    [
        ("dictionary_learning", "relu", {"skip": True}),
        ("dictionary_learning", "jumprelu", {"d_out": 4, "apply_b_dec_to_input": False}),
        ("sparsify", "relu", {}),
        ("sparsify", "topk", {"d_out": 4, "apply_b_dec_to_input": False}),
        ("gemma_scope", "topk", {}),
        ("gemma_scope", "jumprelu", {"skip": True}),
        ("attention_output", "relu", {}),
        ("zip", "relu", {}),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_a_format_cannot_hold_is_not_written(
    format: Any, architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"hold|not one that is written"):
        saes.save(random_sae(architecture, **options), tmp_path / "sae", format=format)
    assert not (tmp_path / "sae").exists()


def test_metadata_that_json_cannot_hold(tmp_path: Path) -> None:
    for value in (torch.zeros(1), float("nan")):
        with pytest.raises(ValueError, match="metadata must be JSON-able"):
            saes.save(random_sae("relu", metadata={"value": value}), tmp_path / "sae")
        assert not (tmp_path / "sae").exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "sae").write_text("")
    with pytest.raises(ValueError, match="saved as a folder"):
        saes.save(random_sae("relu"), tmp_path / "sae")


def test_overwriting_that_is_cut_short_leaves_nothing_that_loads_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saes.save(random_sae("topk", k=2), tmp_path)
    replace, done = os.replace, []

    def killed_at_the_second(source: Any, target: Any) -> None:
        done.append(target)
        if len(done) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(weight_files.os, "replace", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        saes.save(random_sae("topk", k=3, seed=5), tmp_path)
    assert os.listdir(tmp_path) == ["sae_weights.safetensors"]
    with pytest.raises(ValueError, match=r"cfg\.json: the file is missing"):
        saes.load(tmp_path)


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning", "sparsify", "gemma_scope"])
def test_weights_files_are_recognised_too(format: Any, tmp_path: Path) -> None:
    sae = random_sae("jumprelu" if format == "gemma_scope" else "topk")
    saes.save(sae, tmp_path, format=format)
    (file,) = (file for file in tmp_path.iterdir() if file.suffix != ".json")
    assert_same_function(saes.load(file), sae)
    assert_same_function(saes.load(tmp_path, format), sae)


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning", "sparsify"])
def test_the_site_of_heads_is_kept(format: Any, tmp_path: Path) -> None:
    sae = random_sae("topk", site=SITE, metadata={"model": "tiny"})
    loaded = saes.load(saes.save(sae, tmp_path, format=format))
    assert loaded.site == SITE
    if format == "dictionary_learning":
        assert loaded.metadata["model_name"] == "tiny"
        for site, read in (("blocks.2.mlp.hook_post", "blocks.2.mlp.hook_post"), ("hook_embed", None)):
            assert saes.load(saes.save(random_sae("topk", site=site), tmp_path, format=format)).site == read


def test_a_sparsify_transcoder_keeps_both_sites(tmp_path: Path) -> None:
    where = {"site": "blocks.2.hook_resid_mid", "target_site": "blocks.2.hook_mlp_out"}
    sae = random_sae("topk", apply_b_dec_to_input=False, **where)
    loaded = saes.load(saes.save(sae, tmp_path / "layers.7", format="sparsify"))
    assert (loaded.site, loaded.target_site) == (where["site"], where["target_site"])


def test_another_file_is_not_read_in_place_of_the_one_that_is_named(tmp_path: Path) -> None:
    saes.save(random_sae("topk"), tmp_path)
    save_file({"W_enc": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    for format in ("saelens", "sparsify"):
        with pytest.raises(ValueError, match=r"other\.safetensors: the weights of a \w+ folder are called \w+\.safe"):
            saes.load(tmp_path / "other.safetensors", format)


def test_a_folder_of_several_saes_names_them(tmp_path: Path) -> None:
    for layer in (2, 1):
        saes.save(random_sae("topk"), tmp_path / f"blocks.{layer}.attn.hook_z")
    with pytest.raises(ValueError, match=r"give one of them: blocks\.1\.attn\.hook_z, blocks\.2\.attn\.hook_z$"):
        saes.load(tmp_path)


@pytest.mark.usefixtures("unchecked")
def test_folders_that_are_not_clear(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no such folder or file$"):
        saes.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no SAE in it; looked for sae_weights\.safetensors"):
        saes.load(tmp_path)
    with pytest.raises(ValueError, match=r"format='gguf' is unknown"):
        saes.load(tmp_path, "gguf")  # type: ignore[arg-type]
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"notes\.txt: not the weights of an SAE by its name"):
        saes.load(tmp_path / "notes.txt")
    sae = random_sae("topk")
    saes.save(sae, tmp_path)
    saes.save(sae, tmp_path, format="dictionary_learning")
    with pytest.raises(ValueError, match=r"has files of saelens and dictionary_learning; say which with format="):
        saes.load(tmp_path)
    assert_same_function(saes.load(tmp_path, "dictionary_learning"), sae)


def test_convert(tmp_path: Path) -> None:
    sae = random_sae("batch_topk", site=SITE)
    saes.save(sae, tmp_path / "theirs", format="dictionary_learning")
    assert saes.convert(tmp_path / "theirs", tmp_path / "ours") == tmp_path / "ours"
    saes.convert(tmp_path / "ours", tmp_path / "npz", "gemma_scope")
    assert isinstance(saes.load(tmp_path / "ours"), saes.ARCHITECTURES["batch_topk"])
    assert_same_function(saes.load(tmp_path / "npz"), sae)
    for same in (tmp_path / "ours", tmp_path / "ours" / "sae_weights.safetensors"):
        with pytest.raises(ValueError, match="is the folder that is read"):
            saes.convert(same, tmp_path / "ours")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def overwrite(file: Path) -> None:
    file.write_bytes(b"no weights")


def empty(file: Path) -> None:
    file.write_bytes(b"")


WEIGHT_FILES = {
    "saelens": "sae_weights.safetensors",
    "dictionary_learning": "ae.pt",
    "sparsify": "sae.safetensors",
    "gemma_scope": "params.npz",
}


@pytest.mark.parametrize("damage", [cut, overwrite, empty])
@pytest.mark.parametrize("format", WEIGHT_FILES)
def test_damaged_weights(format: Any, damage: Callable[[Path], None], tmp_path: Path) -> None:
    saes.save(random_sae("jumprelu" if format == "gemma_scope" else "topk"), tmp_path, format=format)
    damage(tmp_path / WEIGHT_FILES[format])
    with pytest.raises(ValueError, match=WEIGHT_FILES[format]) as error:
        saes.load(tmp_path)
    assert "\n" not in str(error.value)


def test_damage_anywhere_in_a_compressed_file(tmp_path: Path) -> None:
    saes.save(random_sae("jumprelu"), tmp_path, format="gemma_scope")
    file = tmp_path / "params.npz"
    with np.load(file) as arrays:
        content = dict(arrays)
    np.savez_compressed(file, **content)
    whole, said = file.read_bytes(), []
    for at in range(0, len(whole), 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        try:
            saes.load(tmp_path)  # where nothing depends on the byte, such as a date
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 50
    assert all("params.npz: " in one and "\n" not in one for one in said)


@pytest.mark.parametrize("format", WEIGHT_FILES)
@pytest.mark.parametrize("fault", ["missing", "shape", "nan", "integer", "foreign"])
def test_wrong_tensors_are_named(format: Any, fault: str, tmp_path: Path) -> None:
    saes.save(random_sae("jumprelu" if format == "gemma_scope" else "topk"), tmp_path, format=format)
    path = tmp_path / WEIGHT_FILES[format]
    tensors = weight_files.read_weights(path).tensors
    name = "b_dec"
    if fault == "missing":
        del tensors[name]
    elif fault == "shape":
        tensors[name] = torch.zeros(D_IN + 1)
    elif fault == "nan":
        tensors[name][2] = float("nan")
    elif fault == "integer":
        tensors[name] = torch.zeros(D_IN, dtype=torch.int64)
    else:
        name = "W_other"
        tensors[name] = torch.zeros(3)
    weight_files.write_weights(path, tensors)

    with pytest.raises(ValueError, match=f"{WEIGHT_FILES[format]}: tensor '{name}'") as error:
        saes.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("format", "file", "field", "value"),
    [
        ("saelens", "cfg.json", "d_in", "six"),
        ("saelens", "cfg.json", "d_sae", 0),
        ("saelens", "cfg.json", "architecture", None),
        ("saelens", "cfg.json", "architecture", "transformer"),
        ("saelens", "cfg.json", "k", 11),
        ("saelens", "cfg.json", "metadata", {"interp": {"architecture": "none", "settings": {}}}),
        ("saelens", "cfg.json", "metadata", {"interp": {"architecture": "topk", "settings": {"colour": 1}}}),
        ("saelens", "cfg.json", "apply_b_dec_to_input", 1),
        ("saelens", "cfg.json", "normalize_activations", "something"),
        ("sparsify", "cfg.json", "d_in", None),
        ("sparsify", "cfg.json", "k", 11),
        ("sparsify", "cfg.json", "transcode", "yes"),
        ("dictionary_learning", "config.json", "trainer", [1]),
        ("dictionary_learning", "config.json", "trainer", {"dict_class": "AutoEncoderTopK", "activation_dim": 7}),
        ("dictionary_learning", "config.json", "trainer", {"dict_class": "AutoEncoderTopK", "k": 4}),
        ("dictionary_learning", "config.json", "trainer", {"dict_class": 3}),
    ],
)
def test_wrong_settings_are_named(format: Any, file: str, field: str, value: Any, tmp_path: Path) -> None:
    saes.save(random_sae("topk"), tmp_path, format=format)
    content = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**content, field: value}))
    with pytest.raises(ValueError, match=rf"{file}: field '{field}") as error:
        saes.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"), [(b"{", "not JSON"), (b"[1]", "not a JSON object"), (b"\xff", "not UTF-8 text")]
)
def test_settings_that_are_no_settings(text: bytes, said: str, tmp_path: Path) -> None:
    saes.save(random_sae("topk"), tmp_path)
    (tmp_path / "cfg.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"cfg\.json: {said}"):
        saes.load(tmp_path)


class Malicious:
    """Unpickling this writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_pickles_are_refused(tmp_path: Path) -> None:
    mark = tmp_path / "run"
    for save in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))):
        save({"bias": Malicious(mark)}, tmp_path / "ae.pt")
        with pytest.raises(ValueError, match=r"ae\.pt: refused") as error:
            saes.load(tmp_path)
        assert "\n" not in str(error.value)
    with (tmp_path / "params.npz").open("wb") as file:
        np.savez(file, W_enc=np.array([Malicious(mark)], dtype=object))
    with pytest.raises(ValueError, match=r"params\.npz: not a whole \.npz file of numbers"):
        saes.load(tmp_path / "params.npz")
    assert not mark.exists()


def test_a_pytorch_file_of_something_else(tmp_path: Path) -> None:
    for content in ([torch.zeros(2)], {"bias": 3}):
        torch.save(content, tmp_path / "ae.pt")
        with pytest.raises(ValueError, match=r"ae\.pt: not a dictionary of named tensors"):
            saes.load(tmp_path)


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    sae = random_sae("relu")
    for name, tensor in sae.state_dict().items():
        sae.state_dict()[name].copy_(tensor.bfloat16())
    saes.save(sae, tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "sae_weights.safetensors")
    loaded = saes.load(tmp_path)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded(vectors()), sae(vectors()))


def test_what_another_program_changed_is_not_taken_for_what_was_saved(tmp_path: Path) -> None:
    """SAELens folds decoder norms of the JumpReLU that a BatchTopK is there: thresholds then differ."""
    sae = random_sae("batch_topk")
    saes.save(saes.fold_decoder_norm(sae), tmp_path / "folded")
    saes.save(sae, tmp_path)
    tensors = load_file(tmp_path / "folded" / "sae_weights.safetensors")
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    loaded = saes.load(tmp_path)
    assert loaded.architecture == "jumprelu"
    assert_same_function(loaded, saes.fold_decoder_norm(sae))
