"""The numbers behind the section on images: how attention divides, where heads look, and who needs the picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from interp.heads import pattern
from interp.heads.divergence import divergence, outlier_heads, t_vhd
from interp.model import Model, SiteUnavailable
from interp.report.figures import head_label
from interp.report.measures import extreme_heads
from interp.tasks import Task
from interp.vision import image_values, modality_mass, without_images

Variables = dict[str, Any]
"""Name -> DataArray, or (dims, values)."""

SEEN_HEADS = 4
"""Heads whose attention is drawn over the pictures."""
SEEN_PROMPTS = 3
SEEN_PIXELS = 224
T_VHD_HEADS = 3


def has_images(model: Model, task: Task) -> bool:
    """Whether any clean prompt of a task has an image."""
    return any(bool(model.images.mask(torch.tensor(ids)).any()) for ids in task.clean_ids)


def vision_variables(model: Model, task: Task, effects: xr.DataArray, *, progress: bool | None) -> Variables:
    """What is said of images, as variables of a study.

    Where a family's attention cannot be read, masses and maps are left out, and the attr `unreadable` of
    `vision_divergence` says why.

    Args:
        model: the model.
        task: prompts of one length, with images.
        effects: [layer, head], by which the heads are chosen whose attention is drawn.
        progress: show progress bars; None: in a terminal or notebook only.
    """
    about: dict[str, Any] = {"n_prompts": len(task)}
    found: Variables = {}
    try:
        mass = modality_mass(model, task, progress=progress)
        found["vision_mass"] = mass.assign_attrs(about).reset_coords(drop=True)
        found |= _maps(model, task, effects)
    except SiteUnavailable as reason:
        about["unreadable"] = str(reason)
    return found | _divergence(model, task, about)


def _divergence(model: Model, task: Task, about: dict[str, Any]) -> Variables:
    """Every head's distance with and without the images, outliers, and what each prompt owes to its images."""
    k = min(T_VHD_HEADS, model.n_heads)
    pair = task.clean, without_images(model, task.clean)
    mean = divergence(model, *pair)
    per_prompt = t_vhd(divergence(model, *pair, per_prompt=True), k)
    return {
        "vision_divergence": (("layer", "head"), mean.values, about),
        "vision_outlier": (("layer", "head"), outlier_heads(mean).values),
        "vision_t_vhd": (("vision_prompt",), per_prompt.values, {"k": k, "of_mean": float(t_vhd(mean, k))}),
    }


def _maps(model: Model, task: Task, effects: xr.DataArray) -> Variables:
    """Attention of the heads that matter most, from the last token to the first image of a few prompts."""
    chosen = extreme_heads(abs(effects), SEEN_HEADS, 0)
    maps: list[NDArray[np.float32]] = []
    pictures: list[NDArray[np.uint8]] = []
    texts: list[str] = []
    for prompt in range(len(task)):
        seen = _map(model, task.clean[prompt], chosen)
        if seen is None or (maps and (seen[0].shape, seen[1].shape) != (maps[0].shape, pictures[0].shape)):
            continue
        maps.append(seen[0])
        pictures.append(seen[1])
        texts.append(task.clean_text[prompt])
        if len(maps) == SEEN_PROMPTS:
            break
    if not maps:
        return {}
    return {
        "vision_map": (("vision_shown", "vision_head", "image_row", "image_column"), np.stack(maps)),
        "vision_picture": (("vision_shown", "pixel_row", "pixel_column", "colour"), np.stack(pictures)),
        "vision_text": (("vision_shown",), texts),
        "vision_head_label": (("vision_head",), [head_label(*one) for one in chosen]),
    }


def _map(
    model: Model, ids: torch.Tensor, heads: list[tuple[int, int]]
) -> tuple[NDArray[np.float32], NDArray[np.uint8]] | None:
    """([head, row, column], pixels) of a prompt; None where its image has no grid, or no picture was kept."""
    first = next((image for _, image in model.images.placed(ids.tolist())), None)
    if first is None or first.grid is None or first.picture is None:
        return None
    layers, columns = (sorted(set(indices)) for indices in zip(*heads, strict=True))
    rows = pattern(model, ids[None], layers, columns, rows=[-1]).isel(query=0)
    folded = image_values(model, ids, rows, dim="key")
    maps = np.stack([folded.sel(layer=layer, head=head).values for layer, head in heads])
    picture = first.picture.convert("RGB")
    picture.thumbnail((SEEN_PIXELS, SEEN_PIXELS))
    return maps, np.asarray(picture)
