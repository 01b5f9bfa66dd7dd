"""Sink dimensions: where in the residual stream massive activations live, and how far a token stands out there.

They differ from model to model and are found by calibration on natural text; no table of models is kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.model import Model
from interp.patching.labels import model_provenance
from interp.sinks.massive import RATIO, THRESHOLD, is_massive
from interp.sinks.reading import Tokens, by_layer, token_ids
from interp.tasks.corpus import natural_text

MIN_SEQUENCES = 50
CALIBRATION_LENGTH = 64
EPSILON = 1e-6

Dimensions = Sequence[int] | Int[Tensor, " dimension"] | xr.DataArray
"""Indices into d_model, such as `sink_dimensions` returns."""


def sink_dimensions(
    model: Model,
    tokens: Tokens | None = None,
    *,
    threshold: float = THRESHOLD,
    ratio: float = RATIO,
    sequence_share: float = 0.9,
    layer_share: float = 0.25,
    min_sequences: int = MIN_SEQUENCES,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Dimensions that hold massive activations in nearly all texts, in a good part of the layers.

    A dimension counts in a block's output for a sequence if it is massive there at any token. Kept are those that count
    in at least `sequence_share` of the sequences, in at least `layer_share` of the layers. Costs one forward pass a
    sequence.

    Args:
        model: the model.
        tokens: natural text of one length; by default 50 sequences of 64 tokens of `interp.tasks.corpus.natural_text`.
        threshold: a massive value is above this ...
        ratio: ... and at least so many times the median of its sequence in that layer.
        sequence_share: of the sequences.
        layer_share: of the layers.
        min_sequences: fewer are refused: shares of a handful of texts say little.
        batch_size: sequences a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        DataArray [rank] of int: the dimensions, those of most layers first; empty if there are none. Coordinate
        `layer_share`: in how large a share of the layers each counts.

    Raises:
        ValueError: if there are too few sequences.

    Source: definition of Sun et al. 2024 (arXiv 2402.17762). Checked against planted dimensions in
    tests/sinks/test_dimensions.py.
    """
    started = time.perf_counter()
    if tokens is None:
        tokens = natural_text(model, max(MIN_SEQUENCES, min_sequences), CALIBRATION_LENGTH)
    n_sequences, length = token_ids(tokens).shape
    if n_sequences < min_sequences:
        raise ValueError(
            f"{n_sequences} sequences are too few to calibrate on; give at least {min_sequences}, or set min_sequences"
        )

    def measure(layer: int, seen: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
        return {"present": is_massive(seen["resid_post"], threshold, ratio).any(1)}

    present = by_layer(
        model, tokens, ["resid_post"], measure, description="sink dimensions", batch_size=batch_size, progress=progress
    )["present"]
    of_layers = (present.double().mean(1) >= sequence_share).double().mean(0)
    order = of_layers.argsort(descending=True, stable=True)
    kept = order[of_layers[order] >= layer_share]
    return xr.DataArray(
        kept.numpy(),
        dims="rank",
        coords={"rank": range(len(kept)), "layer_share": ("rank", of_layers[kept].numpy())},
        name="sink_dimensions",
        attrs={
            **model_provenance(model),
            "method": "sink_dimensions",
            "threshold": threshold,
            "ratio": ratio,
            "n_sequences": n_sequences,
            "length": length,
            "seconds": time.perf_counter() - started,
        },
    )


def phi(resid: Float[Tensor, "*batch d_model"], dimensions: Dimensions) -> Float[Tensor, "*batch"]:
    """How far the largest sink dimension of each token stands out: max |x_d| / RMS(x), in float32.

    Between 0 and √d_model, which a single spike reaches. RMS without gain, with ε = 1e-6 under the root.

    Raises:
        ValueError: if no dimension is given, or one is out of range.

    Source: Kang et al. 2025 (arXiv 2503.03321), there read from the stream that enters each layer (`resid_pre`).
    """
    chosen = dimension_indices(dimensions, resid.shape[-1]).to(resid.device)
    if not len(chosen):
        raise ValueError("phi needs at least one sink dimension; sink_dimensions found none in this model")
    values = resid.float()
    rms = (values.square().mean(-1) + EPSILON).sqrt()
    return values[..., chosen].abs().amax(-1) / rms


def phi_rel(resid: Float[Tensor, "*batch d_model"], dimensions: Dimensions) -> Float[Tensor, "*batch"]:
    """`phi` as a share of what it can be at most, √d_model: 0 to 1, comparable between models of different width."""
    return phi(resid, dimensions) / resid.shape[-1] ** 0.5


def dimension_indices(dimensions: Dimensions, d_model: int) -> Int[Tensor, " dimension"]:
    """Dimensions as a tensor of indices.

    Raises:
        ValueError: if one is out of range.
    """
    values = dimensions.cpu() if isinstance(dimensions, Tensor) else np.asarray(dimensions, dtype=np.int64)
    chosen = torch.as_tensor(values).long()
    for one in chosen.tolist():
        if not 0 <= one < d_model:
            raise ValueError(f"dimension {one} is out of range; dimensions run 0..{d_model - 1}")
    return chosen
