"""How much attention each position receives: what sinks are recognised by."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import xarray as xr
from torch import Tensor

from interp.heads.attention_calls import attention_modules, call_stats
from interp.model import Model
from interp.model.attention import AttentionCall, AttentionResult, attention_wrapped
from interp.model.inputs import Prompts
from interp.patching.batching import batches
from interp.patching.labels import model_provenance
from interp.patching.progress import progress_bar


@torch.no_grad()
def attention_received(
    model: Model,
    prompts: Prompts,
    *,
    layers: Sequence[int] | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Mean attention that each position receives, over the queries that may attend to it.

    In a causal model position k of T receives from T - k queries, fewer in layers with a window. Costs one forward pass
    a prompt and as much again for each chosen layer's scores; no pattern is held.

    Args:
        model: the model.
        prompts: token ids [prompt, pos] of one length, or whatever a call of the model takes, which then runs at once.
        layers: which layers; None: all.
        batch_size: prompts a forward pass, where they are token ids; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        DataArray [layer, head, prompt, position], float32; NaN where no query may attend to a position (padding).

    Raises:
        SiteUnavailable: if the attention of this family cannot be read.
        ValueError: if a layer is out of range, or edits of scores or pattern are in force.

    Source: column means of Gu et al. 2024 (arXiv 2410.10781) and Yu et al. 2024 (arXiv 2406.15765).
    """
    started = time.perf_counter()
    modules = attention_modules(model, range(model.n_layers) if layers is None else layers)
    found: dict[int, list[Tensor]] = defaultdict(list)
    padding = prompts.get("attention_mask") if isinstance(prompts, Mapping) else None
    real = padding.bool() if isinstance(padding, Tensor) and padding.dim() == 2 else None

    def see(call: AttentionCall, *, layer: int) -> AttentionResult:
        stats = call_stats(call, real=real)
        found[layer].append((stats.received / stats.n_queries).float().cpu())
        return call.run()

    ids = torch.atleast_2d(prompts) if isinstance(prompts, Tensor) else None
    if ids is not None and not ids.numel():
        raise ValueError(f"no tokens to run in prompts of shape {list(ids.shape)}")
    total = 1 if ids is None else len(ids)
    with (
        attention_wrapped({module: partial(see, layer=layer) for layer, module in modules.items()}),
        progress_bar(total, "reading attention", "prompt", progress=progress) as bar,
    ):
        if ids is None:
            model(prompts, logits_to_keep=1)
        else:
            for rows in batches(total, ids.shape[1], batch_size):
                model.last_logits(ids[rows])
                bar.update(len(ids[rows]))
    values = torch.stack([torch.cat(found[layer]) for layer in modules])
    return xr.DataArray(
        values.transpose(1, 2).numpy(),
        dims=("layer", "head", "prompt", "position"),
        coords={"layer": list(modules), "head": range(model.n_heads)},
        name="attention_received",
        attrs={
            **model_provenance(model),
            "method": "attention_received",
            "n_prompts": values.shape[1],
            "seconds": time.perf_counter() - started,
        },
    )
