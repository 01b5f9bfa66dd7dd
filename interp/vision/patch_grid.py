"""The vision transformer of a model, the images it is given, and where in the image its tokens are.

A vision model by itself has its blocks at `blocks.l`, the vision tower of a model that also reads text at
`vision.blocks.l`; everything here that takes images finds out which. Tokens of a vision transformer are a few of its
own (CLS first, then registers) and one for each patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from interp.model import Model

Images = Mapping[str, Tensor] | Int[Tensor, "*prompt pos"]
"""What the model is called with: a mapping with `pixel_values`, or token ids with images in them."""

IMAGES_A_BATCH = 8


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """Where the patches of an image are: the tokens after `n_prefix` tokens of the model's own."""

    n_rows: int
    n_columns: int
    n_prefix: int
    """CLS and registers; 0 where the model has neither."""
    row: Int[Tensor, " patch"]
    """Row of each patch, in the order of the tokens."""
    column: Int[Tensor, " patch"]

    @property
    def coords(self) -> dict[str, Any]:
        """Coordinates of a `patch` axis: its number, `row` and `column`."""
        return {
            "patch": range(len(self.row)),
            "row": ("patch", self.row.numpy()),
            "column": ("patch", self.column.numpy()),
        }


def vision_tower(model: Model) -> str:
    """The prefix of the sites of the vision transformer: "vision.", or "" for a vision model by itself.

    Raises:
        ValueError: if the model has none.
    """
    if "vision." in model.anatomy.towers:
        return "vision."
    if getattr(model.hf, "main_input_name", "") != "pixel_values":
        raise ValueError(f"{model.name} has no vision transformer; give a vision model or one that sees and reads")
    return ""


def image_batches(model: Model, images: Images, batch_size: int | None = None) -> list[dict[str, Any]]:
    """Arguments of the model for a few images at a time.

    Args:
        model: a model with a vision transformer.
        images: a mapping with `pixel_values`, or token ids with images in them.
        batch_size: images (or prompts) a forward pass; 8 by default. Families whose images come as one packed row of
            patches (Qwen2-VL) take one image at a time whatever it says.

    Raises:
        ValueError: if there is no image, or several images of a packing family in one prompt or mapping.
    """
    vision_tower(model)
    given = {"input_ids": images if images.dim() == 2 else images[None]} if isinstance(images, Tensor) else dict(images)
    lengths = {len(value) for value in given.values() if isinstance(value, Tensor)}
    if "image_grid_thw" in given or len(lengths) != 1:
        batches = [given]
    else:
        first = model.images.expand({name: value[:1] for name, value in given.items()})
        step = 1 if "image_grid_thw" in first else batch_size or IMAGES_A_BATCH
        starts = range(0, lengths.pop(), step)
        batches = [{name: value[start : start + step] for name, value in given.items()} for start in starts]
    expanded = [dict(model.images.expand(batch)) for batch in batches]
    for batch in expanded:
        if "pixel_values" not in batch:
            raise ValueError("no image: give {'pixel_values': ...}, or tokens of model.to_tokens(text, images=[...])")
        if len(batch.get("image_grid_thw", ())) > 1:
            raise ValueError(
                f"{model.name} packs all its images into one row: give one image a prompt, and prompts as token ids or "
                "mappings one by one"
            )
    return expanded


def patch_grid(model: Model, batch: Mapping[str, Tensor], n_tokens: int) -> PatchGrid:
    """Where the patches of the images of a batch are.

    Args:
        model: a model with a vision transformer.
        batch: arguments of one forward pass, as `image_batches` makes them.
        n_tokens: how many tokens the vision transformer makes of an image.

    Raises:
        ValueError: if the tokens do not fit the grid.
    """
    config = model.anatomy.towers[vision_tower(model)].config
    if "image_grid_thw" in batch:
        n_frames, n_rows, n_columns = (int(one) for one in batch["image_grid_thw"][0])
        merged = getattr(config, "spatial_merge_size", 1)
    else:
        size = config.patch_size
        heights = (size, size) if isinstance(size, int) else tuple(size)
        n_rows, n_columns = (
            pixels // one for pixels, one in zip(batch["pixel_values"].shape[-2:], heights, strict=True)
        )
        n_frames, merged = 1, 1
    n_prefix = n_tokens - n_rows * n_columns
    if n_prefix < 0 or n_frames != 1:
        raise ValueError(
            f"{n_tokens} tokens are not one grid of {n_rows} x {n_columns} patches after CLS and registers"
        )
    # Patches that are merged later stand together: the order is (window, place in it) in both directions.
    cells = torch.arange(n_rows * n_columns).view(n_rows // merged, merged, n_columns // merged, merged)
    order = cells.transpose(1, 2).flatten()
    return PatchGrid(n_rows, n_columns, n_prefix, order // n_columns, order % n_columns)


def fold_patches(values: xr.DataArray) -> xr.DataArray:
    """Values by patch as values by row and column: what `draw_over_image` draws.

    Args:
        values: any array with a `patch` axis that has the coordinates `row` and `column`.

    Returns:
        The values with axes `row` and `column` last, in place of `patch`.
    """
    folded = values.drop_vars("patch").set_index(patch=["row", "column"]).unstack("patch")
    return folded.transpose(..., "row", "column")
