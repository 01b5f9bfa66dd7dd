"""Activations of every layer, reduced to small tensors as they are computed: nothing larger than one layer is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Int
from torch import Tensor

from interp.model import Model, Site
from interp.model.hooks import Run, Tap, tapped
from interp.patching.batching import batches
from interp.patching.progress import progress_bar

Tokens = Int[Tensor, "prompt pos"] | Mapping[str, Tensor]
"""Token ids of one length, or all inputs of one batch by name (`input_ids`, `pixel_values`, ...)."""

Measure = Callable[[int, dict[str, Tensor], slice], dict[str, Tensor]]
"""From a layer, its activations by kind of site, and which prompts these are, to tensors [batch, ...] by name."""


@torch.no_grad()
def by_layer(
    model: Model,
    tokens: Tokens,
    kinds: Sequence[str],
    measure: Measure,
    *,
    description: str,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """Measures of every layer on every prompt, [layer, prompt, ...] by name, on the CPU.

    Costs one forward pass a prompt.

    Args:
        model: the model.
        tokens: prompts without padding; a mapping of inputs runs as one batch.
        kinds: the sites that the measure sees together, by short form.
        measure: what to keep of a layer.
        description: what is being done, for the progress bar.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Raises:
        ValueError: if there are no prompts, or some are padded.
        SiteUnavailable: if this family does not have one of the sites.
    """
    found: list[dict[str, list[Tensor]]] = [{} for _ in range(model.n_layers)]

    def keep(layer: int, measured: dict[str, Tensor]) -> None:
        for name, values in measured.items():
            found[layer].setdefault(name, []).append(values.cpu())

    n_prompts = len(token_ids(tokens))
    with progress_bar(n_prompts, description, "prompt", progress=progress) as bar:
        for rows, inputs in _runs(tokens, batch_size):
            with tapped(model.anatomy, list(_taps(model, kinds, measure, rows, keep))):
                model(inputs, logits_to_keep=1)
            bar.update(len(range(*rows.indices(n_prompts))))
    return {name: torch.stack([torch.cat(layer[name]) for layer in found]) for name in found[0]}


def token_ids(tokens: Tokens) -> Int[Tensor, "prompt pos"]:
    """The token ids of the prompts, checked.

    Raises:
        ValueError: if there are none, or some are padded.
    """
    ids = tokens["input_ids"] if isinstance(tokens, Mapping) else tokens
    if ids.numel() == 0:
        raise ValueError(f"there is nothing to run: the tokens have shape {tuple(ids.shape)}")
    if isinstance(tokens, Mapping) and not bool(torch.as_tensor(tokens.get("attention_mask", True)).all()):
        raise ValueError("some prompts are padded; give prompts of one length, and each length by itself")
    return ids


def sink_positions(
    sinks: xr.DataArray | Bool[Tensor, "layer prompt pos"] | None, model: Model, tokens: Tokens
) -> Bool[Tensor, "layer prompt pos"]:
    """Where the sinks are: as given, or the first token of every prompt in every layer.

    Raises:
        ValueError: if the shape is not [layer, prompt, position] of these prompts.
    """
    shape = (model.n_layers, *token_ids(tokens).shape)
    if sinks is None:
        return (torch.arange(shape[-1]) == 0).expand(shape)
    given = torch.from_numpy(np.asarray(sinks)).bool() if isinstance(sinks, xr.DataArray) else sinks.cpu()
    if given.shape != shape:
        raise ValueError(f"the sinks have shape {tuple(given.shape)}; [layer, prompt, position] is {shape} here")
    return given


def position_coords(model: Model, tokens: Tokens) -> dict[str, Any]:
    """Coordinates of results over [prompt, position]: numbers, and each prompt's tokens as text."""
    ids = token_ids(tokens)
    coords: dict[str, Any] = {"prompt": range(len(ids)), "position": range(ids.shape[1])}
    if model.tokenizer is not None:
        coords["token"] = (("prompt", "position"), [model.to_str_tokens(row) for row in ids])
    return coords


def _runs(tokens: Tokens, batch_size: int | None) -> Iterator[tuple[slice, Tokens]]:
    ids = token_ids(tokens)
    if isinstance(tokens, Mapping):
        yield slice(0, len(ids)), tokens
    else:
        for rows in batches(len(ids), ids.shape[1], batch_size):
            yield rows, ids[rows]


def _taps(
    model: Model,
    kinds: Sequence[str],
    measure: Measure,
    rows: slice,
    keep: Callable[[int, dict[str, Tensor]], None],
) -> Iterator[Tap]:
    """Taps that hand the activations of a layer over once the last of them is there, and let go of them."""
    for layer in range(model.n_layers):
        arrived: dict[str, Tensor] = {}
        for kind in kinds:

            def see(
                activation: Tensor, run: Run, layer: int = layer, kind: str = kind, arrived: dict[str, Tensor] = arrived
            ) -> None:
                arrived[kind] = activation
                if len(arrived) == len(kinds):
                    keep(layer, measure(layer, arrived, rows))
                    arrived.clear()

            yield Tap(Site(kind, layer), see)
