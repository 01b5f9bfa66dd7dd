"""Make the heads that draw on a segment of the input speak up (VHR): find them, then scale their output.

`reinforced_heads` finds them in one pass of both inputs in lockstep:

1. run the input without the segment once, and keep the arguments of its blocks (masks, rotary tables);
2. run the full input; when layer l has computed z, run block l of the other branch as well, up to its own z;
3. select the heads of layer l by the divergence of the two z, scale them in both branches, and let both go on, so that
   layer l + 1 is judged on what it will receive.

`reinforced` scales the heads found in every run inside a context, generation with a KV cache included: they are chosen
once, at the first step.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interp.heads.divergence import Sigma, above_median, check_pair, divergence, head_distance, select_heads
from interp.model import Edit, Model, Site
from interp.model.edit import resolve_columns
from interp.model.hooks import Run, Tap, tapped
from interp.model.inputs import Prompts
from interp.patching.labels import model_provenance

Selection = xr.DataArray | Bool[Tensor, "*prompt layer head"]
"""Heads, True where chosen: [layer, head], or [prompt, layer, head] with a choice for each prompt of a batch."""


def reinforced_heads(
    model: Model,
    full: Prompts,
    ablated: Prompts,
    *,
    alpha: float = 2.0,
    layers: Sequence[int] | None = None,
    outliers: bool = True,
    sigma: Sigma = "sample",
    scale_text_branch: bool = True,
    layerwise: bool = True,
    per_prompt: bool = False,
) -> xr.DataArray:
    """The heads that draw most on a segment of the input: those that `reinforced` is to scale.

    Costs two forward passes of `ablated` and one of `full` (layerwise), or one of each. Edits in force act in both
    branches; layerwise, those at chosen positions take the padding of `ablated` to be that of `full`.

    On SmolLM2-135M with a context sentence as the segment (five draws of 12 prompts), heads from plain runs did better
    than heads found layer by layer: scaled by 2, the first raised the answer's log probability in every draw and the
    second lowered it (by 0.06 to 0.34); scaled by 1.5, both raised it (four draws). So try both on other models.

    Args:
        model: the model.
        full: prompts with the segment, as the model takes them: text, token ids or a mapping of inputs.
        ablated: the same prompts without it; lengths may differ.
        alpha: what the heads chosen in earlier layers are scaled by on the way (layerwise only).
        layers: where heads may be chosen; by default `default_layers(model.n_layers)`, as published for 32 layers.
        outliers: leave out heads whose output surges without the segment, as published: see `outlier_heads`.
        sigma: of the outlier rule.
        scale_text_branch: scale the run without the segment too (layerwise only); the paper does not say.
        layerwise: judge each layer with the heads of earlier layers scaled, as published. False: from plain runs.
        per_prompt: choose for each prompt by itself, with a leading `prompt` axis, instead of by means over prompts.

    Returns:
        Bool DataArray [layer, head].

    Raises:
        ValueError: if the two inputs have different numbers of prompts, a layer does not exist, or alpha is not finite.

    Source: He et al. 2024 (arXiv 2412.13949), Algorithm 1. Checked against separate runs with edits in
    tests/heads/test_reinforcement.py.
    """
    check_pair(full, ablated)
    _check_alpha(alpha)
    chosen_layers = default_layers(model.n_layers) if layers is None else layers
    inside = sorted(set(resolve_columns(chosen_layers, model.n_layers, "layer")))
    if not inside:
        raise ValueError("layers is empty: no head could be chosen")
    if layerwise:

        def choose(with_segment: Tensor, without: Tensor) -> Tensor:
            found, activation = head_distance(with_segment, without), without.float().square().sum(-1)
            if not per_prompt:
                found, activation = found.mean(0, keepdim=True), activation.mean(0, keepdim=True)
            return above_median(found, activation if outliers else None, sigma=sigma)

        scale_ablated = alpha if scale_text_branch else 1.0
        by_layer = _Lockstep(model, inside, choose, alpha, scale_ablated).run(full, ablated)
        blank = torch.zeros_like(by_layer[inside[0]])
        stacked = torch.stack([by_layer.get(layer, blank) for layer in range(model.n_layers)], dim=1).cpu()
        flags = stacked if per_prompt else stacked[0]
    else:
        found = divergence(model, full, ablated, per_prompt=per_prompt)
        everywhere = torch.from_numpy(select_heads(found, outliers=outliers, sigma=sigma).values)
        flags = everywhere & torch.isin(torch.arange(model.n_layers), torch.tensor(inside))[:, None]
    dims = ("prompt", "layer", "head") if per_prompt else ("layer", "head")
    return xr.DataArray(
        flags.numpy(),
        dims=dims,
        coords={dim: range(size) for dim, size in zip(dims, flags.shape, strict=True)},
        name="reinforced_heads",
        attrs={
            **model_provenance(model),
            "method": "reinforced_heads",
            "alpha": alpha,
            "layers": inside,
            "outliers": int(outliers),
            "sigma": sigma,
            "scale_text_branch": int(scale_text_branch),
            "layerwise": int(layerwise),
        },
    )


@contextmanager
def reinforced(model: Model, selection: Selection, alpha: float = 2.0) -> Iterator[None]:
    """Scale z of the chosen heads, at all positions of every run inside the context, in this thread.

    Also in `generate` with a KV cache: the choice stays that of the first step, as published.

    Args:
        model: the model.
        selection: which heads; with a prompt axis, a choice for each row of the batches to come.
        alpha: 1 changes nothing, less than 1 weakens the heads, 0 ablates them.

    Raises:
        ValueError: before any run, if the selection does not fit the model.
    """
    _check_alpha(alpha)
    if isinstance(selection, xr.DataArray):
        selection = torch.from_numpy(selection.transpose(..., "layer", "head").values)
    shape = (model.n_layers, model.n_heads)
    if selection.dtype != torch.bool or selection.dim() not in (2, 3) or selection.shape[-2:] != shape:
        raise ValueError(
            f"a selection is boolean, [layer, head] = {list(shape)} or [prompt, layer, head]; "
            f"got {selection.dtype} {list(selection.shape)}"
        )
    by_prompt = selection if selection.dim() == 3 else selection[None]
    edits = [
        Edit(Site("z", layer), scale=_factor(by_prompt[:, layer], alpha))
        for layer in range(model.n_layers)
        if bool(by_prompt[:, layer].any())
    ]
    with model.edited(edits):
        yield


def default_layers(n_layers: int) -> list[int]:
    """Layer 1 and the last 7/16 of the layers, rounded up: 1 and 18..31 of 32, as published for LLaVA-1.5."""
    first_of_last = n_layers - math.ceil(n_layers * 7 / 16)
    return sorted({min(1, n_layers - 1), *range(first_of_last, n_layers)})


def _check_alpha(alpha: float) -> None:
    if not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha}; it is a finite factor, 2 as published")


def _factor(chosen: Bool[Tensor, "prompt head"], alpha: float) -> Float[Tensor, "prompt 1 head 1"]:
    """What z is multiplied by."""
    return torch.where(chosen, alpha, 1.0)[:, None, :, None]


Choose = Callable[[Tensor, Tensor], Tensor]
"""From z [prompt, head, d_head] at the last position, with and without the segment, to heads [prompt or 1, head]."""


class _Lockstep:
    """Two inputs through the same model, layer by layer, so that each layer's heads are chosen before the next runs."""

    def __init__(self, model: Model, layers: Sequence[int], choose: Choose, alpha: float, alpha_ablated: float) -> None:
        self.model = model
        self.choose = choose
        self.alpha = alpha
        self.alpha_ablated = alpha_ablated
        self.layers = frozenset(layers)
        self.owner = threading.get_ident()
        self.chosen: dict[int, Tensor] = {}
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        """Arguments of each block without the segment, after the hidden states."""
        self.start = torch.empty(0)
        """What the first block receives without the segment."""
        self.stream = torch.empty(0)
        """What the next block of the branch without the segment receives."""
        self.full_z: Tensor | None = None
        """Z of the full input in the layer in which the other branch is running; None while it is not."""

    def run(self, full: Prompts, ablated: Prompts) -> dict[int, Bool[Tensor, "prompt head"]]:
        """The heads chosen, by layer."""
        with ExitStack() as stack:
            for block in self.model.tower.blocks:
                # Before the hooks of edits in force, which act again when the block is run again.
                handle = block.module.register_forward_pre_hook(self._keep_call, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            self.model(ablated, logits_to_keep=1)
        taps = [Tap(Site("z", layer), self._tap(layer)) for layer in range(max(self.layers) + 1)]
        with tapped(self.model.anatomy, taps):
            self.model(full, logits_to_keep=1)
        return self.chosen

    def _keep_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != self.owner:
            return
        # Some families make a KV cache unasked; the second run of a block must not be added to it.
        options = {name: value for name, value in kwargs.items() if not name.startswith("past_key_value")}
        hidden, *others = args or (options.pop("hidden_states"),)
        if not self.calls:
            self.start = hidden.clone()
        self.calls.append((tuple(others), options))

    def _tap(self, layer: int) -> Callable[[Tensor, Run], Tensor | None]:
        def tap(z: Tensor, run: Run) -> Tensor | None:
            if self.full_z is not None:
                if layer not in self.layers:
                    return None
                self.chosen[layer] = self.choose(self.full_z[:, -1], z[:, -1])
                return self._scaled(z, layer, self.alpha_ablated)
            self.full_z = z
            try:
                self._run_other_branch(layer)
            finally:
                self.full_z = None
            return self._scaled(z, layer, self.alpha) if layer in self.layers else None

        return tap

    def _run_other_branch(self, layer: int) -> None:
        others, options = self.calls[layer]
        stream = self.start if layer == 0 else self.stream
        output = self.model.tower.blocks[layer].module(stream, *others, **options)
        self.stream = output[0] if isinstance(output, tuple) else output

    def _scaled(self, z: Tensor, layer: int, alpha: float) -> Tensor:
        return z * _factor(self.chosen[layer], alpha).to(z.device, z.dtype)
