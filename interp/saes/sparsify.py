"""EleutherAI's sparsify (eai-sparsify): a folder a hookpoint, with `cfg.json` and `sae.safetensors`; top-k only.

    sae     features = topk(ReLU((x - b_dec) @ encoder.weight.T + encoder.bias))      W_dec [d_sae, d], as here
    transcode=True   x itself is encoded
    skip_connection  output + x @ W_skip.T                                            W_skip [d_out, d_in]

b_dec is subtracted unless the file says `transcode`; `normalize_decoder`, which other loaders go by, only says how it
was trained. ReLU before or after the top-k is the same: what is below zero is zero either way.

Source: eai-sparsify 1.3.3, sparse_coder.py and fused_encoder.py. Checked against that library:
tests/saes/test_original_libraries.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from interp.saes.conversion import assemble, site_of_module
from interp.saes.sae import SAE
from interp.saes.topk import TopKSAE
from interp.saes.weight_files import Settings, Weights, read_settings, read_weights, write_pair

SETTINGS_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"


def load(folder: Path) -> SAE:
    """The sparse coder in a folder; its site is what `save` noted, or is read from the folder's name, a module's.

    In a family with a norm after the module (Gemma 2, OLMo 2) no site is that module's output: set `site` by hand.

    Raises:
        NotImplementedError: if it uses an activation other than top-k.
        ValueError: naming file and field, if a file is damaged or foreign.
    """
    settings, weights = read_settings(folder / SETTINGS_FILE), read_weights(folder / WEIGHTS_FILE)
    _refuse_other_activations(settings)
    transcode = settings.get("transcode", bool, False)
    state = _state(settings, weights, skip=settings.get("skip_connection", bool, False))
    d_sae, k = state["b_enc"].shape[0], settings.size("k")
    if k > d_sae:
        raise ValueError(f"{settings.path}: field 'k' is {k}; there are {d_sae} features")
    arguments = {
        "d_in": settings.size("d_in"),
        "d_sae": d_sae,
        "skip": "W_skip" in state,
        "apply_b_dec_to_input": not transcode,
        "k": k,
    }
    hookpoint = folder.absolute().name
    metadata = {"source_format": "sparsify", "hookpoint": hookpoint}
    return assemble("topk", arguments, state, metadata=metadata, **_sites(settings, hookpoint, transcode))


def _refuse_other_activations(settings: Settings) -> None:
    activation = settings.get("activation", str, "topk")
    if activation != "topk":
        raise NotImplementedError(f"{settings.path}: field 'activation' is {activation!r}; only 'topk' can be loaded")
    if settings.get("signed", bool, False):
        raise NotImplementedError(f"{settings.path}: field 'signed' is true; features below 0 are not supported")


def _state(settings: Settings, weights: Weights, *, skip: bool) -> dict[str, Tensor]:
    d_in = settings.size("d_in")
    # 0 stands for "d_in times the expansion factor".
    d_sae = settings.get("num_latents", int, 0) or d_in * settings.size("expansion_factor")
    state = {
        "W_enc": weights.take("encoder.weight", d_sae, d_in).T,
        "b_enc": weights.take("encoder.bias", d_sae),
        "W_dec": weights.take("W_dec", d_sae, d_in),
        "b_dec": weights.take("b_dec", d_in),
    }
    if skip:
        state["W_skip"] = weights.take("W_skip", d_in, d_in).T
    weights.finish()
    return state


def _sites(settings: Settings, hookpoint: str, transcode: bool) -> dict[str, str | None]:
    """A module's output; a transcoder predicts it from the module's input, known here for an MLP: its norm's output."""
    if "interp" in settings:
        own = settings.part("interp")
        return {name: own.get(name, str, None) for name in ("site", "target_site")}
    output = site_of_module(hookpoint)
    if not transcode:
        return {"site": output}
    if output is None or not output.endswith("hook_mlp_out"):
        return {}
    return {"site": output.replace("hook_mlp_out", "ln2.hook_normalized"), "target_site": output}


def save(sae: SAE, folder: Path) -> None:
    """Write a top-k SAE or transcoder as sparsify reads it, with a field "interp" for the site, which it passes over.

    Raises:
        ValueError: if it is not top-k, or its output is not as wide as its input.
    """
    if not isinstance(sae, TopKSAE) or sae.d_in != sae.d_out:
        raise ValueError(f"sparsify files hold top-k SAEs with d_out == d_in; this is {sae.architecture!r}")
    content: dict[str, Any] = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": False,
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": not sae.apply_b_dec_to_input,
        "d_in": sae.d_in,
    }
    if sae.site is not None:
        content["interp"] = {"site": sae.site, "target_site": sae.target_site}
    tensors = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.T
    write_pair(folder / SETTINGS_FILE, content, folder / WEIGHTS_FILE, tensors)
