"""SAELens's flat settings from before version 6, put into the nested form.

Names changed (`hook_point`, `activation_fn_str`), some were added later (`architecture`, `apply_b_dec_to_input`), and
finetuned files have a factor for each feature that is applied before decoding.
"""

from __future__ import annotations

from typing import Any

import torch

from interp.saes.weight_files import Settings, Weights

_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_METADATA = ("model_name", "hook_name", "hook_layer", "hook_head_index", "context_size", "prepend_bos", "dataset_path")


def as_nested(settings: Settings) -> Settings:
    """The settings as SAELens 6 would write them.

    Raises:
        NotImplementedError: for an activation function other than ReLU and top-k.
    """
    flat = {_RENAMED.get(name, name): value for name, value in settings.content.items()}
    nested = {**flat, "architecture": flat.get("architecture") or "standard"}
    activation, options = flat.get("activation_fn") or "relu", flat.get("activation_fn_kwargs") or {}
    if activation == "topk" or nested["architecture"] == "topk":
        nested |= _top_k(settings, options, flat.get("k"))
    elif activation != "relu":
        raise NotImplementedError(f"{settings.path}: field 'activation_fn' is {activation!r}; ReLU and top-k are read")
    normalise = flat.get("normalize_activations")
    if normalise is None or isinstance(normalise, bool):
        nested["normalize_activations"] = "expected_average_only_in" if normalise else "none"
    nested["metadata"] = {name: flat[name] for name in _METADATA if flat.get(name) is not None}
    return Settings(settings.path, nested)


def _top_k(settings: Settings, options: Any, k: Any) -> dict[str, Any]:
    if not isinstance(options, dict):
        raise ValueError(f"{settings.path}: field 'activation_fn_kwargs' is {options!r}; it must be an object")
    if options.get("signed"):
        raise NotImplementedError(
            f"{settings.path}: field 'activation_fn_kwargs.signed' is true; features below 0 are not supported"
        )
    return {"architecture": "topk", "k": options.get("k", k)}


def fold_scaling_factor(settings: Settings, weights: Weights) -> None:
    """Finetuning's factor for each feature, applied before decoding, folded into the decoder.

    Raises:
        ValueError: if there are factors that the settings do not announce.
    """
    if "scaling_factor" not in weights:
        return
    factor = weights.take("scaling_factor", settings.size("d_sae"))
    if torch.allclose(factor, torch.ones_like(factor)):
        # Untrained: it was written into every file for a time.
        return
    if not settings.get("finetuning_scaling_factor", bool, False):
        raise ValueError(
            f"{weights.path}: tensor 'scaling_factor' is not 1, but {settings.path.name} does not have "
            "'finetuning_scaling_factor': true"
        )
    decoder = weights.take("W_dec", *weights.shape("W_dec", 2))
    weights.tensors["W_dec"] = decoder * factor[:, None]
