"""Dormant heads: those that park their attention on sinks and write little."""

from __future__ import annotations

import time
from functools import partial

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from interp.heads.attention_calls import attention_modules, call_stats
from interp.model import Model
from interp.model.attention import AttentionCall, AttentionResult, attention_wrapped
from interp.patching.labels import model_provenance
from interp.sinks.reading import Tokens, by_layer, sink_positions

MASS = 0.8


def dormant_heads(
    model: Model,
    tokens: Tokens,
    *,
    sinks: xr.DataArray | Bool[Tensor, "layer prompt pos"] | None = None,
    mass: float = MASS,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Heads whose attention rests on sinks while their output is small for their layer.

    Both halves are there by themselves, since either alone misleads: a head may attend to sinks and still write, or
    write little and attend elsewhere. Queries that are sinks themselves are left out: the first token can attend to
    nothing else. Costs one forward pass a prompt, and each layer's scores once more; no pattern is held.

    Args:
        model: the model.
        tokens: prompts of one length.
        sinks: [layer, prompt, position], as `interp.sinks.mask` returns it; None: the first token, in every layer.
        mass: a head that puts at least this on the sinks, in the mean over queries, rests on them.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset [layer, head]: `sink_mass` and `output_norm` (norm of the head's `result`), means over queries and
        prompts; `rests_on_sinks`, `writes_little` (below the layer's median) and `dormant`, both at once. Means are
        NaN, and the rest False, in a layer in which every token is a sink.

    Raises:
        ValueError: if the sinks do not fit the prompts, or edits of scores or pattern are in force.

    Checked against planted heads and loops in tests/sinks/test_dormant.py.
    """
    started = time.perf_counter()
    where = sink_positions(sinks, model, tokens)

    on_sinks: list[list[Tensor]] = [[] for _ in range(model.n_layers)]

    def see(call: AttentionCall, *, layer: int) -> AttentionResult:
        n_seen = sum(map(len, on_sinks[layer]))
        is_sink = where[layer, n_seen : n_seen + len(call.query)]
        mass_on_sinks = call_stats(call, key_sets=is_sink[None]).mass[0].cpu()
        on_sinks[layer].append((mass_on_sinks * ~is_sink[:, None]).sum(-1))
        return call.run()

    def measure(layer: int, seen: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
        norms = _result_norm(model, layer, seen["z"].float())
        return {"norm": (norms * ~where[layer, rows, :, None].to(norms.device)).sum(1)}

    modules = attention_modules(model, range(model.n_layers))
    with attention_wrapped({module: partial(see, layer=layer) for layer, module in modules.items()}):
        norms = by_layer(
            model, tokens, ["z"], measure, description="dormant heads", batch_size=batch_size, progress=progress
        )["norm"]
    n_queries = (~where).sum((1, 2))[:, None]
    sink_mass = torch.stack([torch.cat(layer).sum(0) for layer in on_sinks]) / n_queries
    output_norm = norms.sum(1) / n_queries
    rests = sink_mass >= mass
    # The midpoint of the two middle heads; torch.median is the lower one, and fewer than half can lie below that.
    little = output_norm < torch.quantile(output_norm, 0.5, dim=1, keepdim=True)
    values = {
        "sink_mass": sink_mass,
        "output_norm": output_norm,
        "rests_on_sinks": rests,
        "writes_little": little,
        "dormant": rests & little,
    }
    return xr.Dataset(
        {name: (("layer", "head"), one.numpy()) for name, one in values.items()},
        coords={"layer": range(model.n_layers), "head": range(model.n_heads)},
        attrs={
            **model_provenance(model),
            "method": "dormant_heads",
            "mass": mass,
            "n_prompts": where.shape[1],
            "seconds": time.perf_counter() - started,
        },
    )


def _result_norm(
    model: Model, layer: int, z: Float[Tensor, "prompt pos head d_head"]
) -> Float[Tensor, "prompt pos head"]:
    """Norm of z W_O by head, from W_O W_Oᵀ: the results themselves would be d_model / d_head times larger than z."""
    W_O = model.weights.of_block("W_O", layer).float()
    gram = torch.einsum("hdm,hem->hde", W_O, W_O)
    return torch.einsum("bthd,hde,bthe->bth", z.to(gram.device), gram, z.to(gram.device)).clamp(min=0).sqrt()
