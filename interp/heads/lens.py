"""The logit lens: what the model would predict if it stopped half-way."""

from __future__ import annotations

import time

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.metrics import Metric
from interp.model import Model, Site, UnsupportedModel
from interp.patching.activation import resolve_metric
from interp.patching.batching import batches
from interp.patching.labels import provenance
from interp.tasks import Task

ROWS_AT_ONCE = 256
"""Distributions over the vocabulary that are held together."""


def logit_lens(
    model: Model,
    task: Task,
    *,
    metric: str | Metric | None = None,
    per_prompt: bool = False,
    batch_size: int | None = None,
) -> xr.DataArray:
    """A metric of the residual stream at every depth and position, read through the final norm and unembedding.

    The norm's scale is that of each stream itself, as if the model ended there. At the last position and full depth it
    is the model's own metric. Costs one forward pass a prompt, and one unembedding a depth and position.

    Args:
        model: the model.
        task: its clean prompts, all of one length.
        metric: name in `interp.metrics.METRICS` or a function; the task's own by default.
        per_prompt: keep a leading `prompt` axis instead of the mean over prompts.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.

    Returns:
        DataArray [layer, position]. `layer` counts blocks passed: 0 the embedding, 0.5 after the attention of block 0,
        1 after block 0, ..., n_layers the end (whole steps only where attention and MLP run in parallel). Coordinate
        `stage` names them "0_pre", "0_mid", ..., "final_post"; `token` is the text of the first prompt, `label` what
        stands at a position in all prompts.

    Raises:
        ValueError: if the prompts have several lengths.
        UnsupportedModel: for post-norm models, whose stream is normalised before it reaches the head.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    started = time.perf_counter()
    if model.tower.post_norm:
        raise UnsupportedModel(f"{model.anatomy.family} is a post-norm model: its head does not read a residual stream")
    tokens = task.clean
    name, metric_fn = resolve_metric(metric, task)
    sites, depths, stages = _stages(model)
    values = torch.cat(
        [_metric_at(model, task, sites, rows, metric_fn) for rows in batches(len(tokens), tokens.shape[1], batch_size)]
    )
    prompts = {"prompt": range(len(task))} if per_prompt else {}
    return xr.DataArray(
        (values if per_prompt else values.mean(0)).numpy(),
        dims=(*prompts, "layer", "position"),
        coords={
            **prompts,
            "layer": depths,
            "position": range(tokens.shape[1]),
            "stage": ("layer", stages),
            "token": ("position", list(task.str_tokens[0])),
            "label": ("position", list(task.position_labels)),
        },
        name="logit_lens",
        attrs={
            **provenance(model, task),
            "method": "logit_lens",
            "ablation": "none",
            "metric": name,
            "seconds": time.perf_counter() - started,
        },
    )


def _stages(model: Model) -> tuple[list[Site], list[float], list[str]]:
    """Sites of the accumulated stream in order, the number of blocks each has passed, and TransformerLens's labels."""
    sites, depths, stages = [], [], []
    for layer in range(model.n_layers):
        sites.append(Site("resid_pre", layer))
        depths.append(float(layer))
        stages.append(f"{layer}_pre")
        if not model.tower.parallel:
            sites.append(Site("resid_mid", layer))
            depths.append(layer + 0.5)
            stages.append(f"{layer}_mid")
    return (
        [*sites, Site("resid_post", model.n_layers - 1)],
        [*depths, float(model.n_layers)],
        [*stages, "final_post"],
    )


def _metric_at(
    model: Model, task: Task, sites: list[Site], rows: slice, metric: Metric
) -> Float[Tensor, "prompt layer position"]:
    tokens = task.clean[rows]
    _, cache = model.run_with_cache(tokens, sites, logits_to_keep=1)
    answers, wrong = (
        ids[rows].repeat_interleave(tokens.shape[1], dim=0).to(model.device) for ids in (task.answers, task.wrong)
    )
    by_depth = []
    for site in sites:
        streams = cache[site].flatten(0, 1)
        values = [
            metric(_read(model, streams[start : start + ROWS_AT_ONCE]), answers[start : start + ROWS_AT_ONCE],
                   wrong[start : start + ROWS_AT_ONCE])
            for start in range(0, len(streams), ROWS_AT_ONCE)
        ]  # fmt: skip
        by_depth.append(torch.cat(values).float().cpu().reshape(tokens.shape))
    return torch.stack(by_depth, dim=1)


def _read(model: Model, stream: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
    return model.unembed(model.final_norm(stream))
