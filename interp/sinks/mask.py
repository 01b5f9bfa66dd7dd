"""Which tokens are sinks, layer by layer: what SAE buffers and pattern statistics leave out."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, Literal

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.heads import attention_received
from interp.model import Model
from interp.patching.labels import model_provenance
from interp.sinks.dimensions import Dimensions, dimension_indices, phi_rel, sink_dimensions
from interp.sinks.rate import EPSILON, enough_rows
from interp.sinks.reading import Tokens, by_layer, position_coords, token_ids

Rule = Literal["phi_rel", "attention", "norm"]

RULES: tuple[Rule, ...] = ("phi_rel", "attention", "norm")
TAU = 20.0
"""Times the RMS of a token that its sink dimension is in a sink."""
MAX_TAU_REL = 0.9
TIMES_MEDIAN_NORM = 10.0


def mask(
    model: Model,
    tokens: Tokens,
    by: Rule = "phi_rel",
    *,
    threshold: float | None = None,
    dimensions: Dimensions | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Sink tokens of every layer, as booleans: True = sink.

    A token is a sink of layer l by what enters that layer (`resid_pre`, the output of block l − 1), or by the attention
    that it receives there:

    * "phi_rel": its largest sink dimension is at least 20 times the RMS of the token, in units of √d_model, the most
      that a single spike can reach; 0.9 of that in models too narrow for 20. No sink anywhere if the model has no sink
      dimension;
    * "attention": it receives at least 0.3, in the mean over heads, of the attention of the queries at it and after
      it. Never true of positions with too few such queries (see `rates`);
    * "norm": its norm is at least 10 times the median norm of the prompt's tokens.

    Costs one forward pass a prompt; "phi_rel" without dimensions calibrates first (50 sequences of 64 tokens).

    Args:
        model: the model.
        tokens: prompts of one length.
        by: the rule.
        threshold: instead of the rule's own.
        dimensions: sink dimensions for "phi_rel"; by default `sink_dimensions(model)`.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        DataArray [layer, prompt, position] of bool.

    Raises:
        ValueError: for an unknown rule, or dimensions that the rule does not use.

    Source: "phi_rel" after Kang et al. 2025 (arXiv 2503.03321): φ ≥ 20 at d_model 4096. As a number of RMS it carries
    over to narrow models; as a share of √d_model (0.3125) it does not: in SmolLM2 (576 wide) the sink dimension stands
    out in every token (φ_rel about 0.5, of sinks 0.96 and more), and 0.3125 would call nearly all of them sinks.
    """
    started = time.perf_counter()
    if by not in RULES:
        raise ValueError(f"by={by!r}; it is one of {', '.join(RULES)}")
    if dimensions is not None and by != "phi_rel":
        raise ValueError(f"dimensions are for by='phi_rel'; by={by!r} does not use them")
    about: dict[str, Any] = {
        "by": by,
        "threshold": default_threshold(by, model.d_model) if threshold is None else threshold,
    }
    if by == "attention":
        scores = _mean_received(model, tokens, batch_size, progress)
    else:
        score = _times_median_norm
        if by == "phi_rel":
            given = sink_dimensions(model, progress=progress) if dimensions is None else dimensions
            chosen = dimension_indices(given, model.d_model)
            about["dimensions"] = chosen.tolist()
            score = partial(_phi_or_zero, dimensions=chosen)
        scores = by_layer(
            model,
            tokens,
            ["resid_pre"],
            lambda layer, seen, rows: {"score": score(seen["resid_pre"])},
            description="sink tokens",
            batch_size=batch_size,
            progress=progress,
        )["score"]
    return xr.DataArray(
        (scores >= about["threshold"]).numpy(),
        dims=("layer", "prompt", "position"),
        coords={"layer": range(model.n_layers), **position_coords(model, tokens)},
        name="sinks",
        attrs={**model_provenance(model), "method": "mask", **about, "seconds": time.perf_counter() - started},
    )


def default_threshold(by: Rule, d_model: int) -> float:
    """The threshold of a rule in a model of this width."""
    return {"phi_rel": min(TAU / d_model**0.5, MAX_TAU_REL), "attention": EPSILON, "norm": TIMES_MEDIAN_NORM}[by]


def _mean_received(
    model: Model, tokens: Tokens, batch_size: int | None, progress: bool | None
) -> Float[Tensor, "layer prompt pos"]:
    """Attention received, mean over heads; 0 where too few queries say so."""
    token_ids(tokens)  # refuses padding
    received = attention_received(model, tokens, batch_size=batch_size, progress=progress)
    judged = received.where(enough_rows(received.sizes["position"]))
    return torch.from_numpy(judged.mean("head").fillna(0).transpose("layer", "prompt", "position").values)


def _phi_or_zero(
    resid: Float[Tensor, "prompt pos d_model"], dimensions: Int[Tensor, " dimension"]
) -> Float[Tensor, "prompt pos"]:
    """A model without sink dimensions has no token that stands out in them."""
    return phi_rel(resid, dimensions) if len(dimensions) else torch.zeros(resid.shape[:-1])


def _times_median_norm(resid: Float[Tensor, "prompt pos d_model"]) -> Float[Tensor, "prompt pos"]:
    norms = resid.float().norm(dim=-1)
    return norms / norms.median(-1, keepdim=True).values
