"""What the file formats have in common: an SAE from named weights, and b_dec moved in or out of the encoder."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from interp.saes.architectures import ARCHITECTURES
from interp.saes.gated import GatedSAE
from interp.saes.sae import SAE

AnySAE = TypeVar("AnySAE", bound=SAE)

_MODULES = {
    "": "blocks.{layer}.hook_resid_post",
    "mlp": "blocks.{layer}.hook_mlp_out",
    "attn": "blocks.{layer}.hook_attn_out",
    "self_attn": "blocks.{layer}.hook_attn_out",
    "attention": "blocks.{layer}.hook_attn_out",
}


def assemble(architecture: str, settings: Mapping[str, Any], weights: Mapping[str, Tensor], **where: Any) -> SAE:
    """An SAE of this architecture with these weights.

    Args:
        architecture: a name of `ARCHITECTURES`.
        settings: keyword arguments of its class.
        weights: every tensor of its state.
        **where: `site`, `target_site`, `metadata`.
    """
    sae = ARCHITECTURES[architecture](**settings, **where)
    sae.load_state_dict(dict(weights))
    return sae


@torch.no_grad()
def subtract_b_dec(sae: AnySAE) -> AnySAE:
    """The same function with b_dec subtracted from the input, for formats in which it always is.

    The inverse of `fold_b_dec`: what the subtraction takes away is added to the encoder's biases.
    """
    moved = copy.deepcopy(sae)
    if sae.apply_b_dec_to_input:
        return moved
    shift = moved.b_dec @ moved.W_enc
    if isinstance(moved, GatedSAE):
        moved.b_gate.add_(shift)
        moved.b_mag.add_(shift * moved.r_mag.exp())
    else:
        moved.b_enc.add_(shift)
    moved.apply_b_dec_to_input = True
    return moved


def model_name(sae: SAE) -> str | None:
    """The model that it was trained on, as files call it; `interp.saes.train` notes "model" like all results."""
    return sae.metadata.get("model_name", sae.metadata.get("model"))


def refuse_transcoder(sae: SAE, format_name: str) -> None:
    """For formats that hold autoencoders only.

    Raises:
        ValueError: if the output is not the input, or there is a skip connection.
    """
    if sae.d_out != sae.d_in or sae.target_site is not None or sae.W_skip is not None:
        raise ValueError(f"{format_name} files hold no transcoders and no skip connections; save it as 'saelens'")


def site_of_module(module: str) -> str | None:
    """The site of a Hugging Face module's output: "model.layers.5.mlp" -> "blocks.5.hook_mlp_out"; None: unknown.

    In a family with a norm after attention or MLP (Gemma 2, OLMo 2) or a scaled embedding the site lies after that.
    """
    # GPT-2's `wte` is none: positions are added to it before the first block.
    if module.rpartition(".")[2] in ("embed_tokens", "embed_in"):
        return "hook_embed"
    found = re.fullmatch(r"(?:[\w.]+\.)?(?:layers|h)\.(\d+)(?:\.(\w+))?", module)
    if found is None or (found[2] or "") not in _MODULES:
        return None
    return _MODULES[found[2] or ""].format(layer=found[1])
