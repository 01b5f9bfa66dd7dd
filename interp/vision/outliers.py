"""Tokens of a vision transformer that stand out: by their norm (registers), or by what CLS looks at (DAMRO)."""

from __future__ import annotations

import time
from typing import Any

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from interp.model import HookPoint, Model, Site
from interp.patching.labels import model_provenance
from interp.patching.progress import progress_bar
from interp.vision.patch_grid import Images, PatchGrid, image_batches, patch_grid, vision_tower
from interp.vision.tower_attention import by_layer_and_image

DIMS = ("layer", "image", "patch")


@torch.no_grad()
def norm_outliers(
    model: Model,
    images: Images,
    *,
    sigmas: float = 3.0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Patches whose residual stream is far longer than that of the others: norm > mean + 3 standard deviations.

    Mean and (population) deviation are those of the patches of the same image in the same layer, so that an image's
    outliers do not depend on what else is in the batch. Among n values none is more than √(n − 1) deviations above the
    mean: with ten patches or fewer nothing can pass 3. Costs one forward pass an image.

    Args:
        model: a vision model, or one that sees and reads.
        images: a mapping with `pixel_values`, or token ids with images in them.
        sigmas: how many deviations above the mean.
        batch_size: images a forward pass; 8 by default.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset [layer, image, patch] of `outlier` and `norm`, the norm of `hook_resid_post`, with the coordinates `row`
        and `column`. CLS and registers are no patches.

    Raises:
        ValueError: if there is no vision transformer or no image, or images differ in their number of patches.

    Source: high-norm tokens as in Darcet et al. 2024, "Vision Transformers Need Registers"; the threshold is the rule
    above, theirs is a fixed norm.
    """
    started = time.perf_counter()
    tower = model.anatomy.towers[vision_tower(model)]
    sites = [Site("resid_post", layer, tower=tower.prefix) for layer in range(tower.n_layers)]
    norms: dict[int, list[Tensor]] = {layer: [] for layer in range(tower.n_layers)}

    def keep(activation: Tensor, hook: HookPoint) -> None:
        norms[hook.layer()].append(activation.float().norm(dim=-1).cpu())

    batches = image_batches(model, images, batch_size)
    with progress_bar(len(batches), "token norms", "batch", progress=progress) as bar:
        for batch in batches:
            model.run_with_hooks(batch, [(sites, keep)], logits_to_keep=int(tower.prefix != ""))
            bar.update()
    grids = [patch_grid(model, batch, part.shape[1]) for batch, part in zip(batches, norms[0], strict=True)]
    sizes = {(grid.n_rows, grid.n_columns) for grid in grids}
    if len(sizes) != 1:
        raise ValueError(f"the images make grids of different size ({sorted(sizes)}); give images of one size")
    by_patch = torch.stack([torch.cat(norms[layer]) for layer in norms])[..., grids[0].n_prefix :]
    return _dataset(
        model, grids[0], above(by_patch, sigmas), {"norm": by_patch}, "norm_outliers", started, {"sigmas": sigmas}
    )


def damro_outliers(
    model: Model, images: Images, *, k: int = 10, batch_size: int | None = None, progress: bool | None = None
) -> xr.Dataset:
    """The k patches that CLS attends to most, in every layer: DAMRO's outlier test.

    Attention is that of each head by itself, averaged over heads. (The published code takes one softmax over the whole
    width, without the split into heads.) DAMRO reads the layer before the last, with k = 10 for LLaVA and 4 for
    InstructBLIP: `.isel(layer=-2)`. Costs one forward pass an image.

    Args:
        model: a vision model, or one that sees and reads, with a CLS token.
        images: a mapping with `pixel_values`, or token ids with images in them.
        k: how many patches.
        batch_size: images a forward pass; 8 by default.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset [layer, image, patch] of `outlier` and `attention`, CLS's mean over heads, with the coordinates `row`
        and `column`.

    Raises:
        ValueError: if the vision transformer has no CLS token, or fewer than k patches.

    Source: Gong et al. 2024 (arXiv 2410.04514) and its code, up to the split into heads. Checked by hand in
    tests/vision/test_outliers.py.
    """
    started = time.perf_counter()
    if k < 1:
        raise ValueError(f"k={k}; at least one patch is an outlier")

    def measure(patterns: Tensor, grid: PatchGrid) -> Tensor:
        if grid.n_prefix == 0:
            raise ValueError(f"the vision transformer of {model.name} has no CLS token; use norm_outliers")
        if k > len(grid.row):
            raise ValueError(f"k={k}, but an image has {len(grid.row)} patches")
        return patterns[:, :, 0, grid.n_prefix :].mean(1)

    attention, grid = by_layer_and_image(model, images, measure, rows=[0], batch_size=batch_size, progress=progress)
    return _dataset(model, grid, largest(attention, k), {"attention": attention}, "damro_outliers", started, {"k": k})


def above(values: Float[Tensor, "*axes patch"], sigmas: float) -> Bool[Tensor, "*axes patch"]:
    """Which values exceed the mean of the last axis by this many of its population standard deviations."""
    mean, deviation = values.mean(-1, keepdim=True), values.std(-1, keepdim=True, correction=0)
    return values > mean + sigmas * deviation


def largest(values: Float[Tensor, "*axes patch"], k: int) -> Bool[Tensor, "*axes patch"]:
    """Which values are among the k largest of the last axis."""
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, values.topk(k, dim=-1).indices, True)


def _dataset(
    model: Model,
    grid: PatchGrid,
    outlier: Tensor,
    values: dict[str, Tensor],
    method: str,
    started: float,
    attrs: dict[str, Any],
) -> xr.Dataset:
    variables = {"outlier": outlier, **values}
    return xr.Dataset(
        {name: (DIMS, value.numpy()) for name, value in variables.items()},
        coords={"layer": range(len(outlier)), "image": range(outlier.shape[1]), **grid.coords},
        attrs={
            **model_provenance(model),
            "method": method,
            "grid": [grid.n_rows, grid.n_columns],
            **attrs,
            "seconds": time.perf_counter() - started,
        },
    )
