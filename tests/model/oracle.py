"""What `test_families.py` holds the sites against: numbers and masks that come from transformers and the config alone.

q, k and v are those that transformers hands to an attention function of our own (`SPY`) or, for families outside its
attention interface, those that their private head-splitting methods return.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tests.model.family import Family

SPY = "test_families_spy"
_SPLITTERS = ("_split_heads", "_reshape")
_seen: dict[nn.Module, list[Tensor]] = defaultdict(list)


def _spy(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    _seen[module] += [tensor.transpose(1, 2) for tensor in (query, key, value)]
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, attention_mask, **options)


AttentionInterface.register(SPY, _spy)
AttentionMaskInterface.register(SPY, eager_mask)


@torch.no_grad()
def spied_attention(family: Family, implementation: str) -> dict[str, list[Tensor]]:
    """By path of the attention module, [q, k, v] as attention gets them, each [batch, pos, head, d_head].

    Through the attention interface: after QK-norm and rotary, in an eager run. Outside it: before both, in a run of the
    implementation named (Falcon with ALiBi computes something else under SDPA than eagerly), where k and v may come
    repeated for every query head.
    """
    model = family.make_model("eager" if family.interface else implementation)
    _seen.clear()
    with ExitStack() as stack:
        if family.interface:
            model.set_attn_implementation(SPY)
        else:
            _spy_on_splitting(stack, type(_attention_modules(model, family)[0]))
        model(**family.make_inputs())
    paths = {module: path for path, module in model.named_modules()}
    return {paths[module]: tensors for module, tensors in _seen.items()}


def _attention_modules(model: nn.Module, family: Family) -> list[nn.Module]:
    return [block.get_submodule(family.attn) for block in model.get_submodule(family.blocks)]


def _spy_on_splitting(stack: ExitStack, attention: type[nn.Module]) -> None:
    name = next(name for name in _SPLITTERS if hasattr(attention, name))
    original = getattr(attention, name)

    def splitting(self: nn.Module, tensor: Tensor, *sizes: Any) -> Any:
        parts = original(self, tensor, *sizes)
        for part in parts if isinstance(parts, tuple) else (parts,):
            n_positions = tensor.shape[1]
            _seen[self].append(part if part.shape[1] == n_positions else part.transpose(1, 2))
        return parts

    stack.enter_context(patch.object(attention, name, splitting))


def scale_of(config: Any, family: Family, layer: int) -> float:
    """Factor from rot_q · rot_k to scores."""
    if getattr(config, "model_type", "") == "granite":
        return config.attention_multiplier
    if getattr(config, "query_pre_attn_scalar", None) is not None:
        return config.query_pre_attn_scalar**-0.5
    if config.model_type == "opt":
        return 1.0
    head = getattr(config, "head_dim", None) or _width(config) // _n_heads(config)
    scale = 1.0 if getattr(config, "scale_attn_weights", True) is False else head**-0.5
    return scale / (layer + 1) if getattr(config, "scale_attn_by_inverse_layer_idx", False) else scale


def rotary_gain(model: nn.Module, config: Any) -> tuple[float, float]:
    """What q and k are multiplied by on the way to rot_q and rot_k, apart from the rotation.

    OPT scales q in advance; YaRN scales the rotation of both.
    """
    if config.model_type == "opt":
        return (_width(config) // _n_heads(config)) ** -0.5, 1.0
    factors = {
        float(module.attention_scaling) for module in model.modules() if hasattr(module, "attention_scaling")
    } or {1.0}
    gain = max(factors)
    return (gain, gain) if config.model_type == "gpt_oss" else (1.0, 1.0)


def _width(config: Any) -> int:
    return getattr(config, "embed_dim", None) or config.hidden_size


def _n_heads(config: Any) -> int:
    return getattr(config, "num_heads", None) or config.num_attention_heads


def window_of(config: Any, layer: int) -> int | None:
    """Keys a query sees, itself included; None for all."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if not window or (layer_types and layer_types[layer] != "sliding_attention"):
        return None
    return window


def allowed_keys(config: Any, family: Family, inputs: Mapping[str, Tensor], layer: int, n_positions: int) -> Tensor:
    """Which key each query may attend to, [batch or 1, 1, query, key]."""
    positions = torch.arange(n_positions)
    query, key = positions[:, None], positions[None, :]
    allowed = torch.ones(1, 1, n_positions, n_positions, dtype=torch.bool)
    if family.causal:
        window = window_of(config, layer) or n_positions
        allowed = allowed & (key <= query) & (key > query - window)
    if "token_type_ids" in inputs and family.causal:
        prefix = inputs["token_type_ids"] == 0
        allowed = allowed | (prefix[:, None, :, None] & prefix[:, None, None, :])
    if "attention_mask" in inputs:
        allowed = allowed & inputs["attention_mask"].bool()[:, None, None, :]
    return allowed


def expected_scores(rot_q: Tensor, rot_k: Tensor, *, scale: float, softcap: float | None, allowed: Tensor) -> Tensor:
    """[batch, pos, head, d_head] twice -> [batch, head, query, key], -inf where attention is not allowed."""
    group = rot_q.shape[2] // rot_k.shape[2]
    scores = torch.einsum("bqhd,bkhd->bhqk", rot_q, rot_k.repeat_interleave(group, dim=2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~allowed, float("-inf"))


def expected_pattern(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over keys, with one learned logit a head as a further column that is then dropped."""
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]
