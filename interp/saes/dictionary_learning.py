"""dictionary_learning's folders: `config.json` and `ae.pt`, read as that library reads them (and never as a pickle).

| class | features | b_dec subtracted |
|---|---|---|
| AutoEncoder | ReLU; decoder normalised on loading | yes (`bias`) |
| AutoEncoderNew | ReLU, as stored | no |
| GatedAutoEncoder | gate and magnitude | yes (`decoder_bias`) |
| AutoEncoderTopK | top-k; its stored threshold is not used | yes |
| BatchTopKSAE, MatryoshkaBatchTopKSAE | above one threshold (-1 before there is one) | yes |
| JumpReluAutoEncoder | above a threshold each | no |

`nn.Linear` weights are stored transposed; the others are not.

Source: dictionary_learning 0.1.0, dictionary.py and trainers/. Checked against that library:
tests/saes/test_original_libraries.py.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.model.sites import SITE_DIMS, Site
from interp.saes.conversion import assemble, model_name, refuse_transcoder, subtract_b_dec
from interp.saes.folding import fold_b_dec, fold_decoder_norm
from interp.saes.gated import GatedSAE
from interp.saes.jumprelu import JumpReLUSAE
from interp.saes.matryoshka import MatryoshkaSAE
from interp.saes.relu import ReLUSAE
from interp.saes.sae import SAE
from interp.saes.topk import BatchTopKFamily, TopKFamily, TopKSAE
from interp.saes.weight_files import Settings, Weights, read_settings, read_weights, write_pair

SETTINGS_FILE = "config.json"
WEIGHTS_FILE = "ae.pt"

_SUBMODULE = re.compile(r"(\w+?)_layer_?(\d+)")
"""Names that its own scripts give ("resid_post_layer_5"), and the same for other kinds of site ("z_layer_5")."""


def load(path: Path) -> SAE:
    """The dictionary in a folder, or in a weights file (`ae.pt`, `checkpoints/ae_<step>.pt`).

    Where there is no `config.json` the class is told from the names of the tensors.

    Raises:
        NotImplementedError: for a class that is not in the table.
        ValueError: naming file and field, if a file is damaged or foreign, or contradicts the other.
    """
    weights_file = path / WEIGHTS_FILE if path.is_dir() else path
    settings = _settings(weights_file.parent)
    weights = read_weights(weights_file)
    trainer = settings.part("trainer") if settings else None
    kind = trainer.get("dict_class", str, None) if trainer else None
    kind = kind or _kind_of(weights)
    if kind not in _READERS:
        raise NotImplementedError(f"{weights_file}: dict_class {kind!r} is not one of {', '.join(_READERS)}")
    architecture, arguments, state = _READERS[kind](weights)
    weights.finish()
    if trainer:
        _check_agreement(trainer, arguments)
    site, metadata = _about(trainer, settings)
    sae = assemble(architecture, arguments, state, site=site, metadata={**metadata, "dict_class": kind})
    return _with_unit_decoder(sae) if kind == "AutoEncoder" else sae


def _settings(folder: Path) -> Settings | None:
    """The folder's config; a checkpoint has it one folder up."""
    for place in (folder, folder.parent):
        if (place / SETTINGS_FILE).exists():
            return read_settings(place / SETTINGS_FILE)
        if folder.name != "checkpoints":
            break
    return None


def _kind_of(weights: Weights) -> str:
    for kind, name in (
        ("MatryoshkaBatchTopKSAE", "group_sizes"),
        ("JumpReluAutoEncoder", "W_enc"),
        ("GatedAutoEncoder", "r_mag"),
        ("AutoEncoder", "bias"),
        ("AutoEncoderNew", "decoder.bias"),
    ):
        if name in weights:
            return kind
    # Top-k and batch top-k have the same tensors and are different functions.
    raise ValueError(
        f"{weights.path}: its tensors do not say which class it is; {SETTINGS_FILE} with dict_class is needed"
    )


def _check_agreement(trainer: Settings, arguments: dict[str, Any]) -> None:
    for name, argument in (("activation_dim", "d_in"), ("dict_size", "d_sae"), ("k", "k")):
        said = trainer.get(name, int, None) if argument in arguments else None
        if said is not None and said != arguments[argument]:
            raise ValueError(
                f"{trainer.path}: field 'trainer.{name}' is {said}; the weights have {arguments[argument]}"
            )


def _about(trainer: Settings | None, settings: Settings | None) -> tuple[str | None, dict[str, Any]]:
    if trainer is None or settings is None:
        return None, {"source_format": "dictionary_learning"}
    submodule = trainer.get("submodule_name", str, None)
    found = _SUBMODULE.fullmatch(submodule or "")
    site = str(Site(found[1], int(found[2]))) if found and found[1] in SITE_DIMS else None
    metadata = {
        "source_format": "dictionary_learning",
        "model_name": trainer.get("lm_name", str, None),
        "context_size": settings.part("buffer").get("ctx_len", int, None) if "buffer" in settings else None,
        "submodule_name": submodule,
        "layer": trainer.get("layer", int, None),
    }
    return site, {name: value for name, value in metadata.items() if value is not None}


def _with_unit_decoder(sae: SAE) -> SAE:
    norms = sae.W_dec.detach().norm(dim=-1)
    return sae if torch.allclose(norms, torch.ones_like(norms)) else fold_decoder_norm(sae)


Read = tuple[str, dict[str, Any], dict[str, Tensor]]
"""Architecture, the arguments of its class, and its weights."""


def _linear(weights: Weights, b_dec: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    d_sae, d_in = weights.shape("encoder.weight", 2)
    state = {
        "W_enc": weights.take("encoder.weight", d_sae, d_in).T,
        "W_dec": weights.take("decoder.weight", d_in, d_sae).T,
        "b_dec": weights.take(b_dec, d_in),
    }
    return {"d_in": d_in, "d_sae": d_sae, "apply_b_dec_to_input": True}, state


def _plain(weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    d_in, d_sae = weights.shape("W_enc", 2)
    state = {
        "W_enc": weights.take("W_enc", d_in, d_sae),
        "b_enc": weights.take("b_enc", d_sae),
        "W_dec": weights.take("W_dec", d_sae, d_in),
        "b_dec": weights.take("b_dec", d_in),
    }
    return {"d_in": d_in, "d_sae": d_sae, "apply_b_dec_to_input": True}, state


def _auto_encoder(weights: Weights) -> Read:
    arguments, state = _linear(weights, "bias")
    return "relu", arguments, {**state, "b_enc": weights.take("encoder.bias", arguments["d_sae"])}


def _auto_encoder_new(weights: Weights) -> Read:
    arguments, state = _linear(weights, "decoder.bias")
    state["b_enc"] = weights.take("encoder.bias", arguments["d_sae"])
    return "relu", {**arguments, "apply_b_dec_to_input": False}, state


def _gated(weights: Weights) -> Read:
    arguments, state = _linear(weights, "decoder_bias")
    for ours, theirs in (("b_gate", "gate_bias"), ("b_mag", "mag_bias"), ("r_mag", "r_mag")):
        state[ours] = weights.take(theirs, arguments["d_sae"])
    return "gated", arguments, state


def _top_k(weights: Weights) -> Read:
    arguments, state = _linear(weights, "b_dec")
    state["b_enc"] = weights.take("encoder.bias", arguments["d_sae"])
    if "threshold" in weights:
        weights.take("threshold")
    return "topk", {**arguments, "k": _k(weights, arguments["d_sae"])}, state


def _batch_top_k(weights: Weights) -> Read:
    arguments, state = _linear(weights, "b_dec")
    state["b_enc"] = weights.take("encoder.bias", arguments["d_sae"])
    state["threshold"] = weights.take("threshold").clamp(min=0)
    return "batch_topk", {**arguments, "k": _k(weights, arguments["d_sae"])}, state


def _matryoshka(weights: Weights) -> Read:
    arguments, state = _plain(weights)
    state["threshold"] = weights.take("threshold").clamp(min=0)
    sizes = weights.whole("group_sizes", *weights.shape("group_sizes", 1))
    if min(sizes) < 1 or sum(sizes) != arguments["d_sae"]:
        raise ValueError(f"{weights.path}: tensor 'group_sizes' is {sizes}; it must add up to {arguments['d_sae']}")
    return (
        "matryoshka",
        {**arguments, "k": _k(weights, arguments["d_sae"]), "widths": list(itertools.accumulate(sizes))},
        state,
    )


def _jump_relu(weights: Weights) -> Read:
    arguments, state = _plain(weights)
    state["threshold"] = weights.take("threshold", arguments["d_sae"]).clamp(min=0)
    return "jumprelu", {**arguments, "apply_b_dec_to_input": False}, state


def _k(weights: Weights, d_sae: int) -> int:
    (k,) = weights.whole("k")
    if not 1 <= k <= d_sae:
        raise ValueError(f"{weights.path}: tensor 'k' is {k}; it must be in 1..{d_sae}")
    return k


_READERS: dict[str, Callable[[Weights], Read]] = {
    "AutoEncoder": _auto_encoder,
    "AutoEncoderNew": _auto_encoder_new,
    "GatedAutoEncoder": _gated,
    "AutoEncoderTopK": _top_k,
    "BatchTopKSAE": _batch_top_k,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jump_relu,
}


def save(sae: SAE, folder: Path) -> None:
    """Write an SAE as dictionary_learning reads it.

    What its class subtracts, or does not, is moved into the encoder's biases. A ReLU SAE whose decoder is not of unit
    norm becomes an AutoEncoderNew, because an AutoEncoder would be normalised, and its features scaled, on loading.

    Raises:
        ValueError: if it is a transcoder.
    """
    refuse_transcoder(sae, "dictionary_learning")
    kind, tensors = _written(sae)
    trainer: dict[str, Any] = {"dict_class": kind, "activation_dim": sae.d_in, "dict_size": sae.d_sae}
    if isinstance(sae, TopKFamily):
        trainer["k"] = sae.k
    trainer["lm_name"] = model_name(sae)
    site = _parsed(sae.site)
    if site is not None and site.layer is not None:
        trainer["layer"] = site.layer
        trainer["submodule_name"] = f"{site.kind}_layer_{site.layer}"
    content = {"trainer": trainer, "buffer": {"ctx_len": sae.metadata.get("context_size"), "d_submodule": sae.d_in}}
    write_pair(folder / SETTINGS_FILE, content, folder / WEIGHTS_FILE, tensors)


def _parsed(site: str | None) -> Site | None:
    try:
        return Site.parse(site) if site is not None else None
    except ValueError:
        return None


def _written(sae: SAE) -> tuple[str, dict[str, Tensor]]:
    if isinstance(sae, ReLUSAE):
        return _written_relu(sae)
    if isinstance(sae, JumpReLUSAE):
        sae = fold_b_dec(sae)
        return "JumpReluAutoEncoder", {**_plain_names(sae), "threshold": sae.threshold}
    sae = subtract_b_dec(sae)
    if isinstance(sae, GatedSAE):
        biases = {"r_mag": sae.r_mag, "gate_bias": sae.b_gate, "mag_bias": sae.b_mag}
        return "GatedAutoEncoder", {"decoder_bias": sae.b_dec, **_linear_names(sae), **biases}
    if not isinstance(sae, TopKFamily):
        raise ValueError(f"dictionary_learning has no class for {sae.architecture!r}")
    k = torch.tensor(sae.k, dtype=torch.int)
    if isinstance(sae, TopKSAE):
        tensors = {**_linear_names(sae), "encoder.bias": sae.b_enc, "b_dec": sae.b_dec}
        return "AutoEncoderTopK", {**tensors, "k": k, "threshold": torch.tensor(-1.0)}
    assert isinstance(sae, BatchTopKFamily)
    if isinstance(sae, MatryoshkaSAE):
        sizes = torch.tensor([sae.widths[0], *(b - a for a, b in itertools.pairwise(sae.widths))])
        return "MatryoshkaBatchTopKSAE", {**_plain_names(sae), "k": k, "threshold": sae.threshold, "group_sizes": sizes}
    tensors = {**_linear_names(sae), "encoder.bias": sae.b_enc, "b_dec": sae.b_dec}
    return "BatchTopKSAE", {**tensors, "k": k, "threshold": sae.threshold}


def _written_relu(sae: SAE) -> tuple[str, dict[str, Tensor]]:
    if sae.apply_b_dec_to_input and _with_unit_decoder(sae) is sae:
        return "AutoEncoder", {"bias": sae.b_dec, **_linear_names(sae), "encoder.bias": sae.b_enc}
    sae = fold_b_dec(sae)
    return "AutoEncoderNew", {**_linear_names(sae), "encoder.bias": sae.b_enc, "decoder.bias": sae.b_dec}


def _linear_names(sae: SAE) -> dict[str, Tensor]:
    return {"encoder.weight": sae.W_enc.T, "decoder.weight": sae.W_dec.T}


def _plain_names(sae: SAE) -> dict[str, Tensor]:
    return {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
