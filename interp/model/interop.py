"""Models that already live in this process: plain transformers modules, TransformerLens bridges, nnsight models.

* A transformers module is taken as it is.
* An nnsight model holds the transformers module untouched, and that module is taken.
* A TransformerLens `TransformerBridge` puts its own components in front of the module's parts. The original parts still
  exist beneath them, so a second module of the same class is built without storage and given the very same parameter
  and buffer objects. The bridge is not touched.

Weights are shared in every case, never copied. Neither library is imported here: an object of theirs is recognised by
the module its class comes from.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Live(NamedTuple):
    """A transformers module and the tokenizer that came with it, if one did."""

    hf: nn.Module
    tokenizer: Any


def from_live(source: object) -> Live:
    """The transformers module inside a live object, sharing its weights.

    Raises:
        TypeError: if the object is no model.
        ValueError: if it is a model whose weights cannot be shared; the message says what to load instead.
    """
    if _comes_from(source, "nnsight"):
        return _from_nnsight(source)
    if _comes_from(source, "transformer_lens"):
        return _from_transformer_lens(source)
    if isinstance(source, nn.Module):
        return Live(source, None)
    raise TypeError(
        f"cannot load a {type(source).__name__}: give a hub id, a folder, a .gguf file, or a live transformers, "
        "TransformerLens or nnsight model"
    )


def _comes_from(source: object, package: str) -> bool:
    return any(cls.__module__.partition(".")[0] == package for cls in type(source).__mro__)


def _from_nnsight(source: Any) -> Live:
    hf = getattr(source, "_module", None)
    if hf is not None and getattr(source, "dispatched", True) is False:
        source.dispatch()  # nnsight reads the weights only when the model is first run
        hf = source._module
    if not isinstance(hf, nn.Module) or not hasattr(hf, "config"):
        raise ValueError(f"this nnsight {type(source).__name__} holds no transformers model")
    return Live(hf, getattr(source, "tokenizer", None))


def _from_transformer_lens(source: Any) -> Live:
    altered = getattr(source, "original_model", None)
    if not isinstance(altered, nn.Module) or not hasattr(altered, "config"):
        raise ValueError(
            f"a TransformerLens {type(source).__name__} holds converted weights and no transformers model; load the "
            "transformers model by name, or boot a TransformerBridge"
        )
    hf = _share_weights(altered)
    _check_agreement(source, hf)
    return Live(hf, getattr(source, "tokenizer", None))


def _share_weights(altered: nn.Module) -> nn.Module:
    """A module of the class and config of `altered`, made of the parameter and buffer objects beneath its components.

    It is in evaluation mode, as a freshly loaded one, whatever mode the bridge is in.
    Costs no memory beyond the module tree.
    """
    if len({parameter.device for parameter in altered.parameters()}) > 1:
        raise ValueError("this TransformerBridge is spread over several devices; load the transformers model instead")
    architecture: Any = type(altered)
    with torch.device("meta"):
        hf = architecture(copy.deepcopy(altered.config))
    for path, module in hf.named_modules():
        original = _original_module(altered, path)
        for tensors, originals in ((module._parameters, original._parameters), (module._buffers, original._buffers)):
            for name in [name for name, tensor in tensors.items() if tensor is not None]:
                if originals.get(name) is None:
                    raise ValueError(f"this TransformerBridge holds no original {path}.{name}; boot a fresh one")
                tensors[name] = originals[name]
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:  # a constant that is neither parameter nor buffer
                setattr(module, name, getattr(original, name))
    if getattr(altered, "generation_config", None) is not None:
        hf.generation_config = copy.deepcopy(altered.generation_config)
    return hf.eval()


def _original_module(altered: nn.Module, path: str) -> nn.Module:
    """The module of transformers at a path, beneath the bridge's components on the way."""
    module = _beneath(altered)
    for part in path.split(".") if path else []:
        child = module._modules.get(part)
        if child is None:
            raise ValueError(f"this TransformerBridge holds no original {path}; boot a fresh one")
        module = _beneath(child)
    return module


def _beneath(module: nn.Module) -> nn.Module:
    while (original := module._modules.get("_original_component")) is not None:
        module = original
    return module


@torch.no_grad()
def _check_agreement(bridge: Any, hf: Any) -> None:
    """Run both on a few tokens: a bridge computes with processed or edited copies once its weights were changed.

    Raises:
        ValueError: if their logits differ by more than rounding.
    """
    device = next(hf.parameters()).device
    tokens: Int[Tensor, "1 pos"] = torch.arange(1, 6, device=device)[None] % hf.config.get_text_config().vocab_size
    training = {module: module.training for module in bridge.modules()}
    try:
        bridge.eval()
        theirs: Float[Tensor, "1 pos d_vocab"] = bridge(tokens, return_type="logits").float()
    finally:
        for module, flag in training.items():
            module.training = flag
    ours: Float[Tensor, "1 pos d_vocab"] = hf(input_ids=tokens).logits.float()
    difference = float((theirs - ours).abs().max())
    # 300 roundings of the largest logit: 4e-5 of it in float32, 30% in bfloat16, where a bridge may upcast
    rounding = 300 * torch.finfo(next(hf.parameters()).dtype).eps * float(ours.abs().max())
    if not difference <= rounding:
        raise ValueError(
            "the weights of this TransformerBridge were processed or edited after it was made (its logits differ from "
            f"those of the original weights by up to {difference:.3g}), so they cannot be shared; load the "
            "transformers model, or a bridge without enable_compatibility_mode"
        )
