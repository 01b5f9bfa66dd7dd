"""SAELens's folders, which are also our own: `cfg.json` and `sae_weights.safetensors`.

Written in the layout of SAELens 6, so that it reads what it has a class for: BatchTopK and Matryoshka as the JumpReLU
that they are at inference, as it does itself. `metadata.interp` in the settings says what else there was to know, so
that `load` gives back the class that was saved. Kinds of transcoder unknown to SAELens get a name of the same pattern
("topk_transcoder"), which it refuses.

Read are that layout, its training checkpoints, and the flat settings from before (`saelens_flat`).

Source: SAELens 6.54.12, saes/ and loading/. Checked against that library:
tests/saes/test_original_libraries.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.saes.architectures import ARCHITECTURES
from interp.saes.conversion import assemble, model_name
from interp.saes.folding import as_jumprelu
from interp.saes.sae import SAE
from interp.saes.saelens_flat import as_nested, fold_scaling_factor
from interp.saes.saelens_normalisation import fold_normalisation
from interp.saes.topk import BatchTopKFamily
from interp.saes.weight_files import Settings, Weights, read_settings, read_weights, write_pair

SETTINGS_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
LAYOUT = "6.0.0"
"""The first version of SAELens with this layout; it goes by this number."""

_TRANSCODER = {"relu": "", "jumprelu": "jumprelu_"}
_NAMES = {"relu": "standard"}
_READ = {"standard": "relu", "batchtopk": "batch_topk", "matryoshka_batchtopk": "matryoshka"}
_NOT_SUPPORTED = ("abstopk", "matching_pursuit", "temporal")


def load(folder: Path) -> SAE:
    """The SAE in a folder, normalisation of its input and decoder norms folded in; features as SAELens has them.

    Raises:
        NotImplementedError: for an architecture, activation or normalisation that has no equal here.
        ValueError: naming file and field, if a file is damaged or foreign, or contradicts the other.
    """
    settings, weights = read_settings(folder / SETTINGS_FILE), read_weights(folder / WEIGHTS_FILE)
    settings = settings if "metadata" in settings else as_nested(settings)
    fold_scaling_factor(settings, weights)
    architecture, transcoder, skip = _architecture(settings)
    arguments = _sizes(settings, transcoder)
    arguments["skip"] = skip
    arguments["apply_b_dec_to_input"] = settings.get("apply_b_dec_to_input", bool, not transcoder)
    if transcoder and arguments["apply_b_dec_to_input"]:
        raise ValueError(f"{settings.path}: field 'apply_b_dec_to_input' is true in a transcoder")
    arguments |= _own_settings(settings, architecture, arguments["d_sae"])
    state = _state(settings, weights, architecture, arguments)
    return _finished(settings, architecture, transcoder, arguments, state)


def _architecture(settings: Settings) -> tuple[str, bool, bool]:
    """Our name, whether it is a transcoder, and whether that has a skip connection."""
    name = settings.get("architecture", str)
    if name in _NOT_SUPPORTED:
        raise NotImplementedError(f"{settings.path}: field 'architecture' is {name!r}, which has no equal here")
    transcoder, skip = name.endswith("transcoder"), name.endswith("skip_transcoder")
    own = name.removesuffix("transcoder").removesuffix("skip_").removesuffix("_") or "relu" if transcoder else name
    own = _READ.get(own, own)
    if own not in ARCHITECTURES:
        raise ValueError(f"{settings.path}: field 'architecture' is {name!r}, which is not known")
    return own, transcoder, skip


def _sizes(settings: Settings, transcoder: bool) -> dict[str, Any]:
    sizes = {"d_in": settings.size("d_in"), "d_sae": settings.size("d_sae")}
    return {**sizes, "d_out": settings.size("d_out") if transcoder else sizes["d_in"]}


def _own_settings(settings: Settings, architecture: str, d_sae: int) -> dict[str, Any]:
    if architecture not in ("topk", "batch_topk", "matryoshka"):
        return {}
    if isinstance(settings.content.get("k"), float) and not settings.get("k", float).is_integer():
        raise NotImplementedError(f"{settings.path}: field 'k' is {settings.content['k']}; only whole numbers are read")
    k = int(settings.get("k", float))
    if not 1 <= k <= d_sae:
        raise ValueError(f"{settings.path}: field 'k' is {k}; it must be in 1..{d_sae}")
    if architecture != "matryoshka":
        return {"k": k}
    widths = settings.get("matryoshka_widths", list)
    # The last may be left out.
    whole = all(type(width) is int and 0 < width <= d_sae for width in widths)
    if not whole or widths != sorted(set(widths)):
        raise ValueError(f"{settings.path}: field 'matryoshka_widths' is {widths}; it must ascend to {d_sae}")
    return {"k": k, "widths": sorted({*widths, d_sae})}


def _state(settings: Settings, weights: Weights, architecture: str, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The weights by our names, decoder norms folded where features were selected by pre-activation times norm."""
    d_in, d_sae, d_out = (arguments[name] for name in ("d_in", "d_sae", "d_out"))
    state = {
        "W_enc": weights.take("W_enc", d_in, d_sae),
        "W_dec": weights.take("W_dec", d_sae, d_out),
        "b_dec": weights.take("b_dec", d_out),
    }
    for name in ARCHITECTURES[architecture].feature_vectors:
        if name != "threshold":
            state[name] = weights.take(name, d_sae)
    if arguments["skip"]:
        state["W_skip"] = weights.take("W_skip", d_out, d_in).T
    if architecture == "jumprelu":
        logarithm = "log_threshold" in weights
        stored = weights.take("log_threshold" if logarithm else "threshold", d_sae)
        state["threshold"] = stored.exp() if logarithm else stored.clamp(min=0)
    elif architecture in ("batch_topk", "matryoshka"):
        state["threshold"] = weights.take("topk_threshold").clamp(min=0)
    weights.finish()
    if "k" in arguments and settings.get("rescale_acts_by_decoder_norm", bool, False):
        # The threshold is one of rescaled activations already.
        norms = state["W_dec"].norm(dim=-1).clamp(min=1e-8)
        state |= {
            "W_enc": state["W_enc"] * norms,
            "b_enc": state["b_enc"] * norms,
            "W_dec": state["W_dec"] / norms[:, None],
        }
    return state


def _finished(
    settings: Settings, architecture: str, transcoder: bool, arguments: dict[str, Any], state: dict[str, Tensor]
) -> SAE:
    metadata = dict(settings.get("metadata", dict))
    if metadata.get("hook_head_index") is not None:
        raise NotImplementedError(
            f"{settings.path}: field 'metadata.hook_head_index' is {metadata['hook_head_index']}; "
            "SAEs of single heads are not read"
        )
    where = {"site": settings.part("metadata").get("hook_name", str, None), "target_site": None}
    if transcoder:
        where["target_site"] = settings.part("metadata").get("hook_name_out", str, None)
    if metadata.pop("interp", None) is not None:
        architecture, arguments, state = _as_saved(settings, architecture, arguments, state)
        if metadata.get("model") == metadata.get("model_name"):
            metadata.pop("model_name", None)  # written for SAELens
    for name in ("hook_name", "hook_name_out", "hook_head_index", "hook_head_index_out", "sae_lens_version"):
        metadata.pop(name, None)
    return fold_normalisation(assemble(architecture, arguments, state, metadata=metadata, **where), settings)


def _as_saved(
    settings: Settings, architecture: str, arguments: dict[str, Any], state: dict[str, Tensor]
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The class that `save` had, where the weights still are its own: another program may have changed the file."""
    inner = settings.part("metadata").part("interp")
    saved = inner.get("architecture", str)
    if saved not in ARCHITECTURES:
        raise ValueError(f"{settings.path}: field 'metadata.interp.architecture' is {saved!r}, which is not known")
    if saved != architecture:
        thresholds = state.get("threshold", torch.empty(0))
        if saved not in ("batch_topk", "matryoshka") or len(thresholds.unique()) != 1:
            return architecture, arguments, state
        state = {**state, "threshold": thresholds[0]}
    kept = {**inner.get("settings", dict), **arguments}
    try:
        ARCHITECTURES[saved](**kept)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{settings.path}: field 'metadata.interp.settings': {error}") from None
    return saved, kept, state


def save(sae: SAE, folder: Path) -> None:
    """Write an SAE of any kind; an SAE with an output of its own is written as a transcoder."""
    plain = as_jumprelu(sae) if isinstance(sae, BatchTopKFamily) else sae
    transcoder = sae.d_out != sae.d_in or sae.target_site is not None or sae.W_skip is not None
    name = _NAMES.get(plain.architecture, plain.architecture)
    if transcoder:
        skip = "skip_" if sae.W_skip is not None else ""
        name = _TRANSCODER.get(plain.architecture, f"{plain.architecture}_") + skip + "transcoder"
    content: dict[str, Any] = {
        "architecture": name,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if (sae.site or "").endswith("hook_z") else "none",
        "metadata": {
            "model_name": model_name(sae),
            **sae.metadata,
            "hook_name": sae.site,
            "hook_head_index": None,
            "sae_lens_version": LAYOUT,
            "interp": {"architecture": sae.architecture, "settings": sae.settings()},
        },
    }
    if transcoder:
        content["d_out"] = sae.d_out
        content["metadata"]["hook_name_out"] = sae.target_site
    if plain.architecture == "topk":
        content |= {"k": plain.settings()["k"], "rescale_acts_by_decoder_norm": False}
    tensors = dict(plain.state_dict())
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].T
    write_pair(folder / SETTINGS_FILE, content, folder / WEIGHTS_FILE, tensors)
