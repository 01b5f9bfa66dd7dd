"""The base run of a sweep: what each block receives, and the keys and values of each layer, for some prompts.

Everything that a packed pass over other rows of the same prompts needs: block inputs to start from, rotated keys and
values to attend to, and the other arguments of each block (rotary tables, position ids) to be read at other rows.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interp.model import Model, Site
from interp.model.attention import AttentionCall, AttentionResult, attention_wrapped
from interp.model.capture import capture_taps
from interp.model.hooks import Tap, tapped


@dataclass
class LayerRun:
    """What one block received in the base run."""

    resid: Float[Tensor, "prompt pos d_model"]
    arguments: tuple[Any, ...] = ()
    """Positional arguments after the hidden states."""
    options: Mapping[str, Any] = field(default_factory=dict)
    key: Float[Tensor, "prompt pos kv_head d_head"] = field(default_factory=lambda: torch.empty(0))
    """Rotated, as the scores see it; empty until the run reaches the block's attention."""
    value: Float[Tensor, "prompt pos kv_head d_head"] = field(default_factory=lambda: torch.empty(0))
    causal: bool = True
    window: int | None = None
    """Positions that a query reaches back to, itself included; None: all."""


@dataclass(frozen=True)
class BaseRun:
    """The base run of some prompts."""

    layers: Sequence[LayerRun]
    resid_final: Float[Tensor, "prompt pos d_model"]
    """What the last block returns."""
    logits: Float[Tensor, "prompt d_vocab"]
    """At the last position."""
    activations: Mapping[Site, Tensor]
    """Of the sites asked for, edits of the base run included."""

    @property
    def causal(self) -> bool:
        """Whether no layer lets a position see later ones."""
        return all(layer.causal for layer in self.layers)


def run_base(
    model: Model, prompts: Int[Tensor, "prompt pos"], sites: Sequence[Site], edits: Sequence[Tap] = ()
) -> BaseRun:
    """Run prompts and keep what a packed pass needs.

    Args:
        model: a model whose attention goes through transformers' interface.
        prompts: token ids of equal length.
        sites: sites whose activations are wanted.
        edits: taps of the edits that the base run itself carries.

    Raises:
        NotImplementedError: if a layer's attention mask is neither full nor causal (with or without a window).
    """
    layers: list[LayerRun] = []
    final: list[Tensor] = []
    store: dict[Site, Tensor] = {}
    with ExitStack() as stack:
        # Before the edits' hooks: block inputs are kept as they arrive, since the packed pass edits them again.
        for block in model.tower.blocks:
            stack.callback(block.module.register_forward_pre_hook(_keep_input(layers), with_kwargs=True).remove)
        stack.enter_context(tapped(model.anatomy, [*edits, *capture_taps(sites, store)]))
        stack.callback(model.tower.blocks[-1].module.register_forward_hook(_keep_output(final)).remove)
        numbers = {block.attn: number for number, block in enumerate(model.tower.blocks)}
        stack.enter_context(attention_wrapped({attn: _keep_keys(layers, number) for attn, number in numbers.items()}))
        logits = model.last_logits(prompts)
    return BaseRun(layers, final[0], logits, store)


def _keep_input(layers: list[LayerRun]) -> Any:
    owner = threading.get_ident()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != owner:
            return
        # Some families make a KV cache unasked; packed rows must not be added to it.
        options = {name: value for name, value in kwargs.items() if not name.startswith("past_key_value")}
        hidden, *others = args or (options.pop("hidden_states"),)
        layers.append(LayerRun(hidden, tuple(others), options))

    return hook


def _keep_output(final: list[Tensor]) -> Any:
    owner = threading.get_ident()

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() == owner:
            final.append(output[0] if isinstance(output, tuple) else output)

    return hook


def _keep_keys(layers: list[LayerRun], number: int) -> Any:
    def wrapper(call: AttentionCall) -> AttentionResult:
        layer = layers[number]
        layer.key = call.key.transpose(1, 2).contiguous()
        layer.value = call.value.transpose(1, 2).contiguous()
        layer.causal, layer.window = _reach(call)
        return call.run()

    return wrapper


def _reach(call: AttentionCall) -> tuple[bool, int | None]:
    """Whether attention is causal, and its window; from the mask, or from the call where there is none."""
    length = call.query.shape[2]
    if call.mask is None:
        causal = call.options.get("is_causal")
        window = call.options.get("sliding_window")
        causal = getattr(call.module, "is_causal", True) if causal is None else causal
        return bool(causal), None if window is None or window >= length else int(window)
    mask = call.mask[..., :length]
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    first = allowed[0, 0]
    reach = int(first.sum(-1).max())
    for causal, window in ((True, None), (True, reach), (False, None)):
        expected = allowed_pairs(length, causal=causal, window=window).to(first.device)
        biased = mask.dtype != torch.bool and bool((mask[allowed] != 0).any())
        if bool((allowed == expected).all()) and not biased:
            return causal, window
    raise NotImplementedError(
        f"the attention mask of {type(call.module).__name__} is neither full nor causal nor a window: "
        "use reference=True for this model"
    )


def allowed_pairs(length: int, *, causal: bool, window: int | None) -> Bool[Tensor, "query key"]:
    """Which keys each query may attend to."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return allowed if window is None else allowed & (distance < window)


def packed_options(
    layer: LayerRun, prompt: Int[Tensor, " row"], position: Int[Tensor, " row"]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The block's other arguments, read at packed rows (a batch of one).

    Args:
        layer: the block in the base run.
        prompt: prompt of each row.
        position: position of each row.
    """
    n_prompts, length = layer.resid.shape[:2]

    def at_rows(argument: Any) -> Any:
        if isinstance(argument, tuple | list):
            return type(argument)(at_rows(one) for one in argument)
        if not isinstance(argument, Tensor):
            return argument
        return _tensor_at_rows(argument, n_prompts, length, prompt, position)

    return tuple(map(at_rows, layer.arguments)), {name: at_rows(one) for name, one in layer.options.items()}


def _tensor_at_rows(
    tensor: Tensor, n_prompts: int, length: int, prompt: Int[Tensor, " row"], position: Int[Tensor, " row"]
) -> Tensor | None:
    """A table over positions ([..., batch, pos, feature]) or ids over positions ([..., batch, pos]) at packed rows."""
    if tensor.dim() >= 4 and tensor.shape[-2:] == (length, length):
        return None  # a mask: the packed pass knows what attends to what
    axis = tensor.dim() - 2 if tensor.is_floating_point() else tensor.dim() - 1
    if axis < 0 or tensor.shape[axis] != length:
        return tensor
    prompt, position = prompt.to(tensor.device), position.to(tensor.device)
    if axis == 0:
        return tensor.index_select(0, position)
    if tensor.shape[axis - 1] == 1:
        return tensor.index_select(axis, position)
    if tensor.shape[axis - 1] != n_prompts:
        return tensor
    return tensor.flatten(axis - 1, axis).index_select(axis - 1, prompt * length + position).unsqueeze(axis - 1)
