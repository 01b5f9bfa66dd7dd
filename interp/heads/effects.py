"""How the measures of this room come back: one Dataset with the mean over prompts and its bootstrap interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.metrics import bootstrap_interval
from interp.model import Model
from interp.patching.labels import provenance
from interp.tasks import Task

LEVEL = 0.95


def effect_dataset(
    values: Float[Tensor, "prompt ..."],
    dims: Sequence[str],
    model: Model,
    task: Task,
    attrs: Mapping[str, Any],
    *,
    per_prompt: bool,
    coords: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """`effect`, with `low` and `high`, the bounds of its 95% bootstrap interval over prompts.

    Args:
        values: one value a prompt and cell.
        dims: names of the axes after the prompt axis; numbered from 0 unless `coords` says otherwise.
        model: what it was measured on.
        task: its prompts, in the order of `values`.
        attrs: what the measure says of itself.
        per_prompt: keep a leading `prompt` axis in `effect` instead of the mean; `low` and `high` are those of the mean
            either way, and NaN for a single prompt.
        coords: coordinates beside or instead of the numbers.
    """
    low, high = bootstrap_interval(values, level=LEVEL)
    effect = values.float().numpy()
    numbered = dict(zip(dims, map(range, values.shape[1:]), strict=True))
    all_dims = ("prompt", *dims) if per_prompt else tuple(dims)
    return xr.Dataset(
        {
            "effect": (all_dims, effect if per_prompt else effect.mean(0)),
            "low": (tuple(dims), low.astype("float32")),
            "high": (tuple(dims), high.astype("float32")),
        },
        coords={**numbered, **({"prompt": range(len(task))} if per_prompt else {}), **(coords or {})},
        attrs={**provenance(model, task), "interval": LEVEL, **attrs},
    )


def in_prompt_order(groups: Sequence[Task], parts: Sequence[Tensor]) -> Float[Tensor, "prompt ..."]:
    """Values computed group by group (`task.by_length()`), put back in the order of the task's prompts."""
    order = torch.cat([group.index for group in groups]).argsort()
    return torch.cat(list(parts))[order]
