"""Results as labelled arrays: named dims, token strings beside positions, and how they were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
import xarray as xr
from torch import Tensor

from interp.model import Model, Site
from interp.tasks import Task


def labelled(
    values: Tensor,
    dims: Sequence[str],
    model: Model,
    task: Task,
    attrs: Mapping[str, Any],
    *,
    sites: Sequence[Site],
) -> xr.DataArray:
    """A DataArray of values over a task.

    Args:
        values: any shape; kept in float32, or float64 if they are.
        dims: one name an axis. Beside "position", `token` holds the first clean prompt's tokens and `label` what stands
            there over all prompts (a key position's name where tokens differ); query and key get `query_token`, ...
        sites: the sites that the values are of, one an entry of a "layer" axis. Positions inside a vision tower are
            pieces of an image, which have no tokens.
        attrs: what the method says of itself; model, task, seed, sizes and versions are added.
    """
    coords: dict[str, Any] = {dim: range(length) for dim, length in zip(dims, values.shape, strict=True)}
    if "layer" in dims:
        coords["layer"] = [site.layer for site in sites]
    for dim in ("position", "query", "key"):
        if dim in dims and not sites[0].tower:
            name = "token" if dim == "position" else f"{dim}_token"
            coords[name] = (dim, list(task.str_tokens[0]))
            if dim == "position":
                coords["label"] = (dim, list(task.position_labels))
    return xr.DataArray(
        values.to(torch.promote_types(values.dtype, torch.float32)).numpy(),
        dims=tuple(dims),
        coords=coords,
        name="effect",
        attrs={**provenance(model, task), **attrs},
    )


def model_provenance(model: Model) -> dict[str, Any]:
    """The attrs of a result that belongs to no task: model and versions."""
    import interp

    return {
        "model": model.name,
        # Not "dtype": netCDF keeps that name for how booleans are written.
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "interp": interp.__version__,
        "torch": str(torch.__version__),  # a TorchVersion, which netCDF cannot hold
        "transformers": transformers.__version__,
    }


def provenance(model: Model, task: Task) -> dict[str, Any]:
    """Attrs that every result carries: what was run on what, with which versions. All of them survive netCDF."""
    return {
        **model_provenance(model),
        "task": task.name,
        "n_prompts": len(task),
        "seed": -1 if task.seed is None else task.seed,
    }
