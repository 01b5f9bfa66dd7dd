"""Gemma Scope's `params.npz`: JumpReLU, nothing subtracted from the input, everything stored the way it is used.

The file says neither model nor site: both are read from the folders it lies in, where they are named as in the release
(`gemma-scope-2b-pt-att/layer_5/width_16k/average_l0_52/params.npz`). SAEs of the `att` releases read z, heads
concatenated. Those of the embedding were trained on rows of the embedding table, which the model multiplies by
sqrt(d_model) before the first block reads them: that factor is folded in, so that they fit `hook_embed`.

Source: Lieberum et al. 2024 (arXiv 2408.05147).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch

from interp.saes.conversion import assemble
from interp.saes.folding import as_jumprelu, fold_b_dec, fold_input_scale
from interp.saes.jumprelu import JumpReLUSAE
from interp.saes.relu import ReLUSAE
from interp.saes.sae import SAE
from interp.saes.topk import BatchTopKFamily
from interp.saes.weight_files import read_weights, write_weights

WEIGHTS_FILE = "params.npz"

_RELEASE = re.compile(r"gemma-scope-(\w+)-(pt|it)-(res|att|mlp|transcoders)")
_SITES = {
    "res": "blocks.{layer}.hook_resid_post",
    "att": "blocks.{layer}.attn.hook_z",
    "mlp": "blocks.{layer}.hook_mlp_out",
    "transcoders": "blocks.{layer}.ln2.hook_normalized",
}


def load(path: Path) -> SAE:
    """The SAE, or transcoder, in a `.npz` file or in a folder with `params.npz`.

    Raises:
        ValueError: naming file and field, if the file is damaged or foreign.
    """
    file = path / WEIGHTS_FILE if path.is_dir() else path
    weights = read_weights(file)
    # Some releases write w_enc and w_dec.
    weights.tensors = {f"W_{name[2:]}" if name.startswith("w_") else name: one for name, one in weights.tensors.items()}
    d_in, d_sae = weights.shape("W_enc", 2)
    d_out = weights.shape("W_dec", 2)[1]
    state = {
        "W_enc": weights.take("W_enc", d_in, d_sae),
        "b_enc": weights.take("b_enc", d_sae),
        "W_dec": weights.take("W_dec", d_sae, d_out),
        "b_dec": weights.take("b_dec", d_out),
        "threshold": weights.take("threshold", d_sae).clamp(min=0),
    }
    weights.finish()
    arguments = {"d_in": d_in, "d_sae": d_sae, "d_out": d_out, "apply_b_dec_to_input": False}
    where = _where(file.absolute().parent)
    sae = assemble("jumprelu", arguments, state, **where)
    return fold_input_scale(sae, 1 / math.sqrt(d_in)) if where["site"] == "hook_embed" else sae


def _where(folder: Path) -> dict[str, Any]:
    metadata: dict[str, Any] = {"source_format": "gemma_scope"}
    release, layer = _RELEASE.search(str(folder)), re.search(r"/layer_(\d+)(?:/|$)", folder.as_posix())
    if release is None:
        return {"site": None, "metadata": metadata}
    metadata["model_name"] = f"gemma-2-{release[1]}" + ("-it" if release[2] == "it" else "")
    if release[3] == "res" and "embedding" in folder.as_posix().split("/"):
        return {"site": "hook_embed", "metadata": metadata}
    if layer is None:
        return {"site": None, "metadata": metadata}
    target = _SITES["mlp"].format(layer=layer[1]) if release[3] == "transcoders" else None
    return {"site": _SITES[release[3]].format(layer=layer[1]), "target_site": target, "metadata": metadata}


def save(sae: SAE, folder: Path) -> None:
    """Write what is a JumpReLU at inference: JumpReLU, ReLU (threshold 0), BatchTopK and Matryoshka.

    Raises:
        ValueError: if it is gated, top-k or has a skip connection.
    """
    if not isinstance(sae, ReLUSAE | JumpReLUSAE | BatchTopKFamily) or sae.W_skip is not None:
        raise ValueError(f"params.npz holds JumpReLU SAEs without a skip connection; this is {sae.architecture!r}")
    plain = as_jumprelu(sae) if isinstance(sae, BatchTopKFamily) else sae
    if sae.site == "hook_embed":
        plain = fold_input_scale(plain, math.sqrt(sae.d_in))
    plain = fold_b_dec(plain)
    threshold = plain.threshold if isinstance(plain, JumpReLUSAE) else torch.zeros(sae.d_sae)
    tensors = {name: getattr(plain, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / WEIGHTS_FILE, {**tensors, "threshold": threshold})
