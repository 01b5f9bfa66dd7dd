"""Massive activations: a few huge values at fixed dimensions of the residual stream, at a few tokens.

A value is massive if it is above 100 in absolute terms and at least 1000 times the median |x| of its prompt in that
layer. Which dimensions these are is found anew in every layer: a dimension may be built, erased and built again.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from interp.model import Model
from interp.patching.labels import model_provenance
from interp.sinks.reading import Tokens, by_layer, token_ids

THRESHOLD = 100.0
RATIO = 1000.0


def massive_activations(
    model: Model,
    tokens: Tokens,
    *,
    threshold: float = THRESHOLD,
    ratio: float = RATIO,
    alive: float = 0.3,
    share: float = 0.5,
    top: int = 3,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """The largest values of every block's output, and the layers between which massive dimensions live.

    Read from `resid_post`, the output of each block. (transformers' last hidden state is behind the final norm, which
    hides what the last block does.) The median is over all tokens and dimensions of one prompt in one layer. Costs one
    forward pass a prompt.

    The definition's 1000 is a round number, and a dimension that is massive in one layer may act the same in others at
    some hundred times the median: a dimension that is massive in any layer counts as alive wherever it is above the
    threshold and `alive` times the ratio.

    Args:
        model: the model.
        tokens: prompts of one length.
        threshold: a massive value is above this ...
        ratio: ... and at least so many times the median.
        alive: the part of `ratio` that is asked of a massive dimension in its other layers; 1: all of it.
        share: a dimension is massive, or alive, in a layer where it is so in at least this share of the prompts, at any
            token.
        top: largest values to list, a layer and prompt.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset with

        * over [layer, prompt, rank], largest first: `value` (signed), `position`, `dimension`, `ratio` (|value| /
          median; NaN where the median is 0), `massive`, and `token` if there is a tokenizer;
        * over [layer, prompt]: `median_size`, the median |x|;
        * over [layer, massive_dimension], for dimensions that are massive in some layer: `peak`, the largest |x| at any
          token, mean over prompts; `massive_share` and `alive_share` of the prompts;
        * over [span], in the order of birth: `span_dimension`; `born`, the first layer after which it is alive;
          `erased`, the first layer after which it is gone (NaN: it stays to the end). One dimension may have several.

    Source: Sun et al. 2024 (arXiv 2402.17762). Checked against planted activations in tests/sinks/test_massive.py.
    """
    started = time.perf_counter()
    ids = token_ids(tokens)

    def measure(layer: int, seen: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
        resid = seen["resid_post"].float()
        return {
            **_largest(resid, top),
            "peak": resid.abs().amax(1),
            "is_massive": is_massive(resid, threshold, ratio).any(1),
            "is_alive": is_massive(resid, threshold, ratio * alive).any(1),
        }

    found = by_layer(
        model,
        tokens,
        ["resid_post"],
        measure,
        description="massive activations",
        batch_size=batch_size,
        progress=progress,
    )
    size, median = found["value"].abs(), found["median"][..., None]
    ranked = {
        **{name: found[name] for name in ("value", "position", "dimension")},
        "ratio": (size / median).masked_fill(median == 0, torch.nan),
        "massive": (size > threshold) & (size >= ratio * median),
    }
    variables: dict[str, Any] = {name: (("layer", "prompt", "rank"), one.numpy()) for name, one in ranked.items()}
    if model.tokenizer is not None:
        strings = [model.to_str_tokens(row) for row in ids]
        variables["token"] = (("layer", "prompt", "rank"), _strings_at(strings, found["position"]))
    attrs = {"threshold": threshold, "ratio": ratio, "alive": alive, "share": share, "n_prompts": len(ids)}
    return xr.Dataset(
        {**variables, "median_size": (("layer", "prompt"), found["median"].numpy()), **_lives(found, share)},
        coords={"layer": range(model.n_layers), "prompt": range(len(ids)), "rank": range(top)},
        attrs={
            **model_provenance(model),
            "method": "massive_activations",
            **attrs,
            "seconds": time.perf_counter() - started,
        },
    )


def is_massive(
    resid: Float[Tensor, "prompt pos d_model"], threshold: float = THRESHOLD, ratio: float = RATIO
) -> Bool[Tensor, "prompt pos d_model"]:
    """Which values are massive: |x| > threshold and |x| ≥ ratio × the median |x| of the prompt."""
    size = resid.float().abs()
    return (size > threshold) & (size >= ratio * _median(size)[:, None, None])


def spans(present: Bool[Tensor, "layer dimension"]) -> list[tuple[int, int, int | None]]:
    """(dimension, first layer, first layer without it or None) of every run of layers that have a dimension."""
    found = []
    for dimension in present.any(0).nonzero()[:, 0].tolist():
        padded = torch.cat([torch.zeros(1), present[:, dimension].float(), torch.zeros(1)]).diff()
        starts, ends = (padded > 0).nonzero()[:, 0].tolist(), (padded < 0).nonzero()[:, 0].tolist()
        found += [
            (dimension, start, end if end < len(present) else None) for start, end in zip(starts, ends, strict=True)
        ]
    return sorted(found, key=lambda span: (span[1], span[0]))


def _median(size: Float[Tensor, "prompt pos d_model"]) -> Float[Tensor, " prompt"]:
    return size.flatten(1).median(-1).values


def _largest(resid: Float[Tensor, "prompt pos d_model"], top: int) -> dict[str, Tensor]:
    flat = resid.flatten(1)
    where = flat.abs().topk(top).indices
    return {
        "value": flat.gather(1, where),
        "position": where // resid.shape[-1],
        "dimension": where % resid.shape[-1],
        "median": _median(resid.abs()),
    }


def _lives(found: dict[str, Tensor], share: float) -> dict[str, Any]:
    """Variables of the dimensions that are massive in some layer, and of the spans in which they live."""
    shares = {name: found[f"is_{name}"].float().mean(1) for name in ("massive", "alive")}
    dimensions = (shares["massive"] >= share).any(0).nonzero()[:, 0]
    lives = spans(shares["alive"][:, dimensions] >= share)
    axes = ("layer", "massive_dimension")
    return {
        "massive_dimension": ("massive_dimension", dimensions.numpy()),
        "peak": (axes, found["peak"].mean(1)[:, dimensions].numpy()),
        **{f"{name}_share": (axes, values[:, dimensions].numpy()) for name, values in shares.items()},
        "span_dimension": ("span", [int(dimensions[index]) for index, _, _ in lives]),
        "born": ("span", [born for _, born, _ in lives]),
        "erased": ("span", [float("nan") if erased is None else float(erased) for _, _, erased in lives]),
    }


def _strings_at(strings: list[list[str]], position: Tensor) -> list[Any]:
    """The token at each position, [layer, prompt, rank] as nested lists."""
    return [
        [[tokens[one] for one in row] for tokens, row in zip(strings, layer, strict=True)]
        for layer in position.tolist()
    ]
