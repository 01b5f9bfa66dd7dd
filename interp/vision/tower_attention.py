"""Attention patterns of a vision transformer, one layer and a few images at a time, never all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.heads.attention_calls import pattern_rows
from interp.model import Model, Site
from interp.model.attention import AttentionCall, AttentionResult, attention_wrapped
from interp.model.points import locate
from interp.patching.progress import progress_bar
from interp.vision.patch_grid import Images, PatchGrid, image_batches, patch_grid, vision_tower

Measure = Callable[[Float[Tensor, "image head query key"], PatchGrid], Float[Tensor, "image ..."]]
"""From the patterns of one layer on some images to one value (of any shape) an image."""


@torch.no_grad()
def by_layer_and_image(
    model: Model,
    images: Images,
    measure: Measure,
    *,
    rows: Sequence[int] | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> tuple[Float[Tensor, "layer image ..."], PatchGrid]:
    """A measure of every layer's patterns on every image.

    Patterns are recomputed from queries and keys in float32, whatever attention implementation the model runs. Costs
    one forward pass an image; holds the patterns of one layer for the images of a batch.

    Args:
        model: a model with a vision transformer.
        images: a mapping with `pixel_values`, or token ids with images in them.
        measure: what to keep of the patterns.
        rows: queries wanted, such as [0] for CLS alone; None: all.
        batch_size: images a forward pass; 8 by default.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        (values, where the patches are).

    Raises:
        ValueError: if there is no vision transformer or no image, or images differ in their number of patches.
    """
    batches = image_batches(model, images, batch_size)
    tower = model.anatomy.towers[vision_tower(model)]
    modules = [
        locate(model.anatomy, Site("rot_q", layer, tower=tower.prefix)).module for layer in range(tower.n_layers)
    ]
    found: list[list[Tensor]] = [[] for _ in modules]
    grids: list[PatchGrid] = []

    def see(call: AttentionCall, *, layer: int, batch: Mapping[str, Any]) -> AttentionResult:
        grid = patch_grid(model, batch, call.key.shape[2])
        wanted = torch.arange(call.query.shape[2]) if rows is None else torch.tensor(rows)
        found[layer].append(measure(pattern_rows(call, range(tower.n_heads), wanted), grid).float().cpu())
        grids.append(grid)
        return call.run()

    with progress_bar(len(batches), "reading vision attention", "batch", progress=progress) as bar:
        for batch in batches:
            seen = {module: partial(see, layer=layer, batch=batch) for layer, module in enumerate(modules)}
            with attention_wrapped(seen):
                model(batch, logits_to_keep=int(tower.prefix != ""))
            bar.update()
    shapes = {(grid.n_rows, grid.n_columns, grid.n_prefix) for grid in grids}
    if len(shapes) != 1:
        raise ValueError(f"the images make grids of different size ({sorted(shapes)}); give images of one size")
    return torch.stack([torch.cat(parts) for parts in found]), grids[0]
