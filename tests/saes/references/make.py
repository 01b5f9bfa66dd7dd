"""Compare the loaders and writers of SAE files with the original libraries, and write `originals.safetensors`.

Needs dictionary-learning 0.1.0, eai-sparsify 1.3.3 and sae-lens 6.54.12 (with transformer-lens 3), which cannot be
installed beside this package's own dependencies:

>>> SPARSIFY_DISABLE_TRITON=1 PYTHONPATH=<where they are> python tests/saes/references/make.py

Every case is a tiny SAE with random weights, written to files by the original library, read by `interp.saes.load`, and
compared on 64 vectors; then written by `interp.saes.save` and read by the original again.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dictionary_learning import dictionary as dl
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary
from sae_lens import SAE, TrainingSAE
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

from interp import saes

HERE = Path(__file__).parent
D_IN, D_SAE, TOKENS, STORED = 4, 8, 64, 10


class Case(NamedTuple):
    """One SAE of an original library, in a folder."""

    features: Tensor
    reconstruction: Tensor
    read_again: Callable[[Path], tuple[Tensor, Tensor]]
    """How the original reads what we write."""
    format: saes.storage.Format


def inputs() -> Tensor:
    """The vectors that every case is compared on; the test makes the same."""
    return torch.sin(1.7 * torch.arange(TOKENS * D_IN)).reshape(TOKENS, D_IN) * 2


def randomise(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            scale = 0.3 if "threshold" in name or name == "r_mag" else 0.7
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale
            tensor.data.copy_(drawn.abs() if "threshold" in name else drawn)


def dictionary_learning_case(folder: Path, kind: str, module: torch.nn.Module) -> Case:
    randomise(module)
    torch.save(module.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": kind, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 3, "lm_name": "org/tiny"}
    if hasattr(module, "k"):
        trainer["k"] = int(module.k)
    config = {"trainer": {**trainer, "submodule_name": "resid_post_layer_3"}, "buffer": {"ctx_len": 16}}
    (folder / "config.json").write_text(json.dumps(config))
    return Case(*_dictionary_learning(folder), _dictionary_learning, "dictionary_learning")


def _dictionary_learning(folder: Path) -> tuple[Tensor, Tensor]:
    dictionary, _ = load_dictionary(str(folder), "cpu")
    features = dictionary.encode(inputs())
    return features, dictionary.decode(features)


def sparsify_case(folder: Path, **settings: Any) -> Case:
    coder = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=3, **settings))
    randomise(coder)
    coder.save_to_disk(folder)
    return Case(*_sparsify(folder), _sparsify, "sparsify")


def _sparsify(folder: Path) -> tuple[Tensor, Tensor]:
    coder = SparseCoder.load_from_disk(folder)
    encoded = coder.encode(inputs())
    features = torch.zeros(TOKENS, D_SAE).scatter(1, encoded.top_indices, encoded.top_acts)
    return features, coder(inputs()).sae_out


def saelens_case(folder: Path, architecture: str, *, site: str = "blocks.3.hook_resid_post", **settings: Any) -> Case:
    transcoder = architecture.endswith("transcoder")
    if transcoder:
        settings = {"d_out": 6, "apply_b_dec_to_input": False, **settings}
    metadata = {"model_name": "tiny", "hook_name": site, "sae_lens_version": "6.54.12"}
    if transcoder:
        metadata["hook_name_out"] = "blocks.3.hook_mlp_out"
    config = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "metadata": metadata, **settings}
    sae = SAE.from_dict(config)
    randomise(sae)
    sae.save_model(folder)
    return Case(*_saelens(folder), _saelens, "saelens")


def _saelens(folder: Path) -> tuple[Tensor, Tensor]:
    sae = SAE.load_from_disk(folder)
    z_like = sae.cfg.reshape_activations == "hook_z"
    x = inputs().reshape(TOKENS, 2, D_IN // 2) if z_like else inputs()
    return sae.encode(x), sae(x).reshape(TOKENS, -1)


def batch_topk_case(folder: Path, architecture: str, *, inference: bool) -> Case:
    """Inference files, in which it is a JumpReLU, and files of a training checkpoint, in which it is not."""
    widths = {"matryoshka_widths": [3, D_SAE]} if "matryoshka" in architecture else {}
    config = {
        "architecture": architecture,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "k": 3,
        "metadata": {"hook_name": "x"},
        **widths,
    }
    sae = TrainingSAE.from_dict(config)
    randomise(sae)
    sae.save_inference_model(folder)
    case = Case(*_saelens(folder), _saelens, "saelens")
    if not inference:
        sae.save_model(folder)
    return case


def normalised_case(folder: Path, mode: str, architecture: str, **settings: Any) -> Case:
    """What SAELens computes with the activations scaled by its own `ActivationScaler`."""
    from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening

    matrix = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whitening = ActivationWhitening(torch.arange(D_IN).double(), matrix, torch.linalg.inv(matrix))
    scaler = ActivationScaler(0.37) if mode == "expected_average_only_in" else ActivationScaler(None, whitening)
    saelens_case(folder, architecture, normalize_activations=mode, **settings)
    scaler.save(str(folder / "activation_scaler.json"))
    sae = SAE.load_from_disk(folder)
    scaled = scaler.scale(inputs())
    return Case(sae.encode(scaled), scaler.unscale(sae(scaled)), _saelens, "saelens")


CASES: dict[str, Callable[[Path], Case]] = {
    "AutoEncoder": lambda at: dictionary_learning_case(at, "AutoEncoder", dl.AutoEncoder(D_IN, D_SAE)),
    "AutoEncoderNew": lambda at: dictionary_learning_case(at, "AutoEncoderNew", dl.AutoEncoderNew(D_IN, D_SAE)),
    "Gated": lambda at: dictionary_learning_case(at, "GatedAutoEncoder", dl.GatedAutoEncoder(D_IN, D_SAE)),
    "TopK": lambda at: dictionary_learning_case(at, "AutoEncoderTopK", AutoEncoderTopK(D_IN, D_SAE, 3)),
    "BatchTopK": lambda at: dictionary_learning_case(at, "BatchTopKSAE", BatchTopKSAE(D_IN, D_SAE, 3)),
    "Matryoshka": lambda at: dictionary_learning_case(
        at, "MatryoshkaBatchTopKSAE", MatryoshkaBatchTopKSAE(D_IN, D_SAE, 3, [3, 5])
    ),
    "JumpReLU": lambda at: dictionary_learning_case(at, "JumpReluAutoEncoder", dl.JumpReluAutoEncoder(D_IN, D_SAE)),
    "layers.3": sparsify_case,
    "layers.3.mlp": lambda at: sparsify_case(at, transcode=True, skip_connection=True),
    "standard": lambda at: saelens_case(
        at, "standard", site="blocks.3.attn.hook_z", reshape_activations="hook_z", normalize_activations="none"
    ),
    "gated": lambda at: saelens_case(at, "gated"),
    "jumprelu": lambda at: saelens_case(at, "jumprelu", apply_b_dec_to_input=False),
    "topk": lambda at: saelens_case(at, "topk", k=3, rescale_acts_by_decoder_norm=True),
    "batchtopk": lambda at: batch_topk_case(at, "batchtopk", inference=True),
    "batchtopk_training": lambda at: batch_topk_case(at, "batchtopk", inference=False),
    "matryoshka_training": lambda at: batch_topk_case(at, "matryoshka_batchtopk", inference=False),
    "skip_transcoder": lambda at: saelens_case(at, "skip_transcoder"),
    "transcoder": lambda at: saelens_case(at, "transcoder"),
    "jumprelu_transcoder": lambda at: saelens_case(at, "jumprelu_transcoder"),
    "jumprelu_skip_transcoder": lambda at: saelens_case(at, "jumprelu_skip_transcoder"),
    "scaled": lambda at: normalised_case(at, "expected_average_only_in", "standard"),
    "whitened": lambda at: normalised_case(at, "covariance_whitening", "topk", k=3, rescale_acts_by_decoder_norm=True),
    "whitened_gated": lambda at: normalised_case(at, "covariance_whitening", "gated", apply_b_dec_to_input=False),
}
UNSTORED = (
    "matryoshka_training",
    "transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
    "whitened",
    "whitened_gated",
)
"""Compared, but left out of the stored file, to keep it small."""


def compare(name: str, folder: Path) -> Case:
    """One case in both directions."""
    case = CASES[name](folder)
    sae = saes.load(folder)
    features = sae.encode(inputs())
    errors = [(features - case.features).abs().max(), (sae(inputs()) - case.reconstruction).abs().max()]
    again = folder.parent / "again" / folder.name
    saes.save(sae, again, format=case.format)
    theirs = case.read_again(again)
    errors += [(theirs[0] - case.features).abs().max(), (theirs[1] - case.reconstruction).abs().max()]
    logging.info(f"{name:26s} {type(sae).__name__:14s} " + "  ".join(f"{float(error):.1e}" for error in errors))
    assert max(errors) < 1e-5, name
    assert (case.features > 0).float().mean() > 0.1, f"{name}: hardly a feature is active"
    return case


@contextmanager
def folder_named(name: str) -> Iterator[Path]:
    root = Path(tempfile.mkdtemp())
    try:
        (root / name).mkdir()
        yield root / name
    finally:
        shutil.rmtree(root)


@torch.no_grad()
def main() -> None:
    tensors, texts = {}, {}
    for name in CASES:
        with folder_named(name) as folder:
            case = compare(name, folder)
            if name in UNSTORED:
                continue
            texts[name] = {file.name: json.loads(file.read_text()) for file in folder.glob("*.json")}
            (file,) = (file for file in folder.iterdir() if file.suffix in (".pt", ".safetensors"))
            texts[name]["weights"] = file.name
            weights = torch.load(file, weights_only=True) if file.suffix == ".pt" else load_file(file)
            tensors |= {f"{name}/{key}": tensor.contiguous() for key, tensor in weights.items()}
            tensors[f"{name}:features"] = case.features[:STORED].contiguous()
            tensors[f"{name}:output"] = case.reconstruction[:STORED].contiguous()
    save_file(tensors, HERE / "originals.safetensors")
    (HERE / "originals.json").write_text(json.dumps(texts, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
