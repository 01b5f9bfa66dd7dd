"""Sink rate: in how many heads does a position receive more than its share of attention."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import xarray as xr

from interp.heads import attention_received
from interp.model import Model
from interp.sinks.reading import Tokens, token_ids

EPSILON = 0.3
MIN_ROWS = 16
HIDDEN_FACTOR = 5.0


def sink_rate(
    model: Model,
    tokens: Tokens,
    *,
    epsilon: float = EPSILON,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Share of heads in which a position is a sink, in percent, and the hidden sinks of every head.

    Costs one forward pass a prompt; see `rates` for what is computed from the attention received.

    Args:
        model: the model.
        tokens: prompts of one length.
        epsilon: a position is a sink of a head if it receives more than this.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset as of `rates`.

    Raises:
        ValueError: for an epsilon that is no share, and padded prompts.
    """
    started = time.perf_counter()
    token_ids(tokens)  # refuses padding
    received = attention_received(model, tokens, batch_size=batch_size, progress=progress)
    found = rates(received, epsilon=epsilon)
    found.attrs |= {"method": "sink_rate", "seconds": time.perf_counter() - started}
    return found


def rates(received: xr.DataArray, *, epsilon: float = EPSILON, hidden_factor: float = HIDDEN_FACTOR) -> xr.Dataset:
    """Sink rates and hidden sinks from attention received.

    With α_k[l, h] the mean attention that position k receives over the queries at k and after it, Sink_k = mean over
    layers and heads of 1[α_k > ε], taken prompt by prompt and averaged. The last positions are averaged over a handful
    of rows and look like sinks by chance: rates are given in the first half of the prompt, and where at least 16 rows
    are left; NaN elsewhere.

    Args:
        received: [layer, head, prompt, position], as `interp.heads.attention_received` returns it.
        epsilon: of the indicator.
        hidden_factor: a hidden sink is a position other than the first that receives more than this / length.

    Returns:
        Dataset with `rate` [position], `rate_by_layer` [layer, position], `rate_by_head` [layer, head, position] in
        percent (Sink_k is at position k − 1), and `hidden_sinks` [layer, head], their mean number in a prompt.

    Source: Gu et al. 2024 (arXiv 2410.10781), Sink_k^ε; hidden sinks of Yu et al. 2024 (arXiv 2406.15765). Where a
    sliding window hides a position from later queries, the mean is over those that see it. Checked against loops over
    eager patterns in tests/sinks/test_rate.py.
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon={epsilon:g} is no share of attention; it lies between 0 and 1")
    length = received.sizes["position"]
    is_sink = (received > epsilon).where(received.notnull() & enough_rows(length))
    by_head = 100 * is_sink.mean("prompt")
    about: dict[str, Any] = {
        "epsilon": epsilon,
        "hidden_factor": hidden_factor,
        "n_prompts": received.sizes["prompt"],
        "length": length,
    }
    return xr.Dataset(
        {
            "rate": by_head.mean(("layer", "head")).astype(np.float32),
            "rate_by_layer": by_head.mean("head").astype(np.float32),
            "rate_by_head": by_head.astype(np.float32),
            "hidden_sinks": hidden_sinks(received, hidden_factor).sum("position").mean("prompt").astype(np.float32),
        },
        coords={"position": range(length)},
        attrs={**received.attrs, **about, "method": "rates"},
    )


def hidden_sinks(received: xr.DataArray, factor: float = HIDDEN_FACTOR) -> xr.DataArray:
    """Positions other than the first that receive more than factor / length: bool, shaped as the attention received.

    Without the row guard of `rates`, as published: the last positions count.
    """
    return (received > factor / received.sizes["position"]) & (np.arange(received.sizes["position"]) > 0)


def enough_rows(length: int) -> xr.DataArray:
    """Bool [position]: where the mean over later queries is over enough of them (first half, or at least 16)."""
    position = np.arange(length)
    return xr.DataArray((position + 1 <= length / 2) | (length - position >= MIN_ROWS), dims="position")
