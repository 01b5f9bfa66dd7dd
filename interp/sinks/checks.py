"""What makes a sink a sink inside a head: a small value, and a key that queries point to."""

from __future__ import annotations

import time

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from interp.model import Model
from interp.patching.labels import model_provenance
from interp.sinks.reading import Tokens, by_layer, sink_positions


def sink_checks(
    model: Model,
    tokens: Tokens,
    *,
    sinks: xr.DataArray | Bool[Tensor, "layer prompt pos"] | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Values and keys of sink tokens beside those of all other tokens.

    * `value_norm_ratio`, `key_norm_ratio` [layer, kv_head]: mean norm over the sinks / mean norm over the other tokens.
      A sink's value is far smaller: attention parked there adds next to nothing;
    * `sink_cosine`, `other_cosine` [layer, head]: cosine between queries and keys as the scores are made of them, of a
      query with the sinks before it and with the other tokens up to itself. Averaged over the queries that are no sinks
      and see both kinds.

    Costs one forward pass a prompt, with memory linear in its length. Sliding windows are not looked at.

    Args:
        model: the model.
        tokens: prompts of one length.
        sinks: [layer, prompt, position], as `interp.sinks.mask` returns it; None: the first token, in every layer.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset, the mean over prompts that have sinks in that layer; NaN if none has.

    Raises:
        ValueError: if the sinks do not fit the prompts.

    Source: Gu et al. 2024 (arXiv 2410.10781), section on keys and values of the first token. Checked against loops in
    tests/sinks/test_checks.py.
    """
    started = time.perf_counter()
    where = sink_positions(sinks, model, tokens)

    def measure(layer: int, seen: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
        is_sink = where[layer, rows].to(seen["v"].device)
        causal = bool(getattr(model.tower.blocks[layer].attn, "is_causal", True))
        sink_cosine, other_cosine = _cosines(seen["rot_q"].float(), seen["rot_k"].float(), is_sink, causal)
        return {
            "value_norm_ratio": _norm_ratio(seen["v"], is_sink),
            "key_norm_ratio": _norm_ratio(seen["rot_k"], is_sink),
            "sink_cosine": sink_cosine,
            "other_cosine": other_cosine,
        }

    found = by_layer(
        model,
        tokens,
        ["v", "rot_q", "rot_k"],
        measure,
        description="keys and values of sinks",
        batch_size=batch_size,
        progress=progress,
    )
    axis = {"value_norm_ratio": "kv_head", "key_norm_ratio": "kv_head", "sink_cosine": "head", "other_cosine": "head"}
    return xr.Dataset(
        {name: (("layer", axis[name]), values.nanmean(1).numpy()) for name, values in found.items()},
        coords={
            "layer": range(model.n_layers),
            "head": range(model.n_heads),
            "kv_head": range(model.n_kv_heads),
        },
        attrs={
            **model_provenance(model),
            "method": "sink_checks",
            "n_prompts": where.shape[1],
            "seconds": time.perf_counter() - started,
        },
    )


def _norm_ratio(
    vectors: Float[Tensor, "prompt pos kv_head d_head"], is_sink: Bool[Tensor, "prompt pos"]
) -> Float[Tensor, "prompt kv_head"]:
    """Mean norm over the sinks / mean norm over the others; 0 / 0 = NaN where there are none."""
    norms = vectors.float().norm(dim=-1)
    means = [(norms * kind[..., None]).sum(1) / kind.sum(1)[:, None] for kind in (is_sink, ~is_sink)]
    return means[0] / means[1]


def _cosines(
    query: Float[Tensor, "prompt pos head d_head"],
    key: Float[Tensor, "prompt pos kv_head d_head"],
    is_sink: Bool[Tensor, "prompt pos"],
    causal: bool,
) -> tuple[Float[Tensor, "prompt head"], Float[Tensor, "prompt head"]]:
    """Mean cosine of queries that are no sinks with the (sink, other) keys that they see; NaN where none sees both.

    The mean over keys of cos(q, k) is q̂ · mean k̂, so that running sums of unit keys replace the matrix of all pairs.
    """
    query = torch.nn.functional.normalize(query, dim=-1)
    key = torch.nn.functional.normalize(key, dim=-1).repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    means, counts = [], []
    for kind in (is_sink, ~is_sink):
        chosen = key * kind[..., None, None]
        total, count = chosen.cumsum(1), kind.cumsum(1)
        if not causal:
            total, count = total[:, -1:].expand_as(total), count[:, -1:].expand_as(count)
        means.append((query * total).sum(-1) / count[..., None])
        counts.append(count)
    judged = (~is_sink & (counts[0] > 0))[..., None]
    return tuple((mean.masked_fill(~judged, 0)).sum(1) / judged.sum(1) for mean in means)  # type: ignore[return-value]
