"""Which heads have alike patterns, by two numbers that a small autoencoder finds for each map."""

from __future__ import annotations

import time

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from interp.model import Model
from interp.patching.labels import model_provenance
from interp.patching.progress import progress_bar
from interp.vision.clusters import on_a_plane
from interp.vision.patch_grid import Images, PatchGrid
from interp.vision.tower_attention import by_layer_and_image

SIDE = 16
HIDDEN = 64
LEARNING_RATE = 3e-3


def mean_patterns(
    model: Model, images: Images, *, side: int = SIDE, batch_size: int | None = None, progress: bool | None = None
) -> xr.DataArray:
    """The pattern of each head, averaged over images and shrunk to a small square.

    Queries and keys are all tokens, CLS first. Cells of the square are means over the entries that fall into them.
    Costs one forward pass an image; holds side² numbers a head and image.

    Args:
        model: a vision model, or one that sees and reads.
        images: a mapping with `pixel_values`, or token ids with images in them.
        side: cells on a side; fewer where there are fewer tokens.
        batch_size: images a forward pass; 8 by default.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        DataArray [layer, head, query, key].

    Raises:
        ValueError: if there is no vision transformer or no image, or a square without cells.
    """
    started = time.perf_counter()
    if side < 1:
        raise ValueError(f"side={side}; a square has at least 1 cell on a side")

    def shrink(patterns: Tensor, grid: PatchGrid) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(patterns, min(side, patterns.shape[-1]))

    found, _ = by_layer_and_image(model, images, shrink, batch_size=batch_size, progress=progress)
    values = found.mean(1)
    dims = ("layer", "head", "query", "key")
    return xr.DataArray(
        values.numpy(),
        dims=dims,
        coords={dim: range(length) for dim, length in zip(dims, values.shape, strict=True)},
        name="pattern",
        attrs={
            **model_provenance(model),
            "method": "mean_patterns",
            "n_images": found.shape[1],
            "seconds": time.perf_counter() - started,
        },
    )


def pattern_codes(
    patterns: xr.DataArray, *, n_clusters: int = 4, epochs: int = 200, seed: int = 0, progress: bool | None = None
) -> xr.Dataset:
    """Two numbers a head from which an autoencoder restores its map, and k-means clusters of them.

    One hidden layer on each side of the code; maps standardised as a whole; Adam on all of them at once. Unlike
    `cluster_heads` it needs no features, takes seconds longer, and its axes mean nothing by themselves.

    Args:
        patterns: [layer, head, query, key] of one size, such as `mean_patterns` makes them.
        n_clusters: how many clusters.
        epochs: passes over all maps.
        seed: of the autoencoder's weights and of k-means; the global random state is neither used nor changed.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset of `coordinate` [layer, head, axis], `cluster` [layer, head] (0 = the largest), and `loss` [epoch], the
        share of the maps' variance that is not restored.

    Raises:
        ValueError: for another shape, maps that are NaN or all the same, no epochs, or more clusters than heads.

    The idea is that of Li et al. 2023, "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt", as
    recalled; the architecture is ours.
    """
    if patterns.dims != ("layer", "head", "query", "key"):
        raise ValueError(f"patterns have the axes {patterns.dims}; they must be layer, head, query, key")
    if epochs < 1:
        raise ValueError(f"epochs={epochs}; an autoencoder is trained for 1 or more")
    maps = torch.tensor(patterns.values).float().flatten(0, 1).flatten(1)
    deviation = maps.std(correction=0)
    if not bool(deviation > 0):
        raise ValueError("the patterns are NaN or the same everywhere; there is nothing to tell heads apart by")
    codes, losses = _train((maps - maps.mean()) / deviation, epochs, seed, progress)
    dataset = on_a_plane(patterns, codes.double().numpy(), n_clusters=n_clusters, seed=seed)
    dataset = dataset.assign(loss=("epoch", losses))
    dataset.attrs |= {"method": "pattern_codes", "epochs": epochs}
    return dataset


def _train(
    maps: Float[Tensor, "head pixel"], epochs: int, seed: int, progress: bool | None
) -> tuple[Float[Tensor, "head 2"], list[float]]:
    """(code of each map, loss after each epoch)."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        size = maps.shape[1]
        encoder = nn.Sequential(nn.Linear(size, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 2))
        decoder = nn.Sequential(nn.Linear(2, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, size))
        optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=LEARNING_RATE)
        losses = []
        with progress_bar(epochs, "autoencoder of patterns", "epoch", progress=progress) as bar:
            for _ in range(epochs):
                loss = (decoder(encoder(maps)) - maps).square().mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(loss.item())
                bar.update()
        return encoder(maps).detach(), losses
