"""How far heads look: attention by distance, on the patch grid of an image or along a text."""

from __future__ import annotations

import time

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.heads.attention_calls import call_stats, visible_keys
from interp.heads.rows import Measure, row_means, token_groups
from interp.model import Model
from interp.model.attention import AttentionCall
from interp.patching.labels import model_provenance, provenance
from interp.tasks import Task
from interp.vision.patch_grid import Images, PatchGrid
from interp.vision.tower_attention import by_layer_and_image


def khop_profile(
    model: Model, images: Images, *, batch_size: int | None = None, progress: bool | None = None
) -> xr.Dataset:
    """How much attention a patch gives to the ring of patches k steps away, for every head of a vision transformer.

    Distance is Chebyshev distance on the patch grid: hop 0 is the patch itself, hop 1 the eight around it. CLS and
    registers are left out, as queries and as keys, and rows renormalised over the patches.

    * `mass`: Σ_j A_ij over the ring, averaged over patches and images; adds up to 1 over hops;
    * `per_cell`: that mass divided by how many patches the ring has, averaged over the patches that have such a ring:
      near an edge rings are cut, and patches far from a corner have no ring of the largest hops.

    Costs one forward pass an image, and each layer's patterns.

    Args:
        model: a vision model, or one that sees and reads.
        images: a mapping with `pixel_values`, or token ids with images in them.
        batch_size: images a forward pass; 8 by default.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset [layer, head, hop].

    Raises:
        ValueError: if there is no vision transformer or no image.

    The exact formula of the visual-analytics paper that speaks of k-hop strength (Li et al. 2023, "How Does Attention
    Work in Vision Transformers?") has not been checked; this is the definition above. Checked against a loop in
    tests/vision/test_khop.py.
    """
    started = time.perf_counter()

    def measure(patterns: Tensor, grid: PatchGrid) -> Tensor:
        return torch.stack(khop_strength(between_patches(patterns, grid), grid_hops(grid)), dim=1)

    found, grid = by_layer_and_image(model, images, measure, batch_size=batch_size, progress=progress)
    mass, per_cell = found.nanmean(1).unbind(1)
    return xr.Dataset(
        {"mass": (("layer", "head", "hop"), mass.numpy()), "per_cell": (("layer", "head", "hop"), per_cell.numpy())},
        coords={name: range(length) for name, length in zip(("layer", "head", "hop"), mass.shape, strict=True)},
        attrs={
            **model_provenance(model),
            "method": "khop_profile",
            "grid": [grid.n_rows, grid.n_columns],
            "n_images": found.shape[1],
            "seconds": time.perf_counter() - started,
        },
    )


def text_khop_profile(
    model: Model,
    prompts: Task | Int[Tensor, "prompt pos"],
    *,
    max_hop: int = 16,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """`khop_profile` along a text: how much attention a token gives to the tokens k = |i − j| away.

    A ring is one token in a causal model, up to two in one that reads both ways; tokens that a sliding window hides
    belong to it and get nothing. Costs one forward pass a prompt; no pattern is held.

    Args:
        model: the model; its text tower is read.
        prompts: a task (its clean prompts) or token ids.
        max_hop: the largest k.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset [layer, head, hop] of `mass` and `per_cell`; NaN where no prompt is that long.

    Raises:
        ValueError: if `max_hop` is negative.
    """
    started = time.perf_counter()
    if max_hop < 0:
        raise ValueError(f"max_hop={max_hop}; the largest hop is 0 (the token itself) or more")
    hops = range(max_hop + 1)
    groups: list[tuple[Tensor, Measure]] = [
        (tokens, lambda call, rows: _ring_of_tokens(call, max_hop)) for tokens in token_groups(prompts)
    ]
    means = row_means(model, groups, batch_size=batch_size, progress=progress)
    about = provenance(model, prompts) if isinstance(prompts, Task) else model_provenance(model)
    return xr.Dataset(
        {
            name: (("layer", "head", "hop"), torch.stack([means[f"{name} {hop}"][0] for hop in hops], dim=-1).numpy())
            for name in ("mass", "per_cell")
        },
        coords={"layer": range(model.n_layers), "head": range(model.n_heads), "hop": hops},
        attrs={**about, "method": "text_khop_profile", "seconds": time.perf_counter() - started},
    )


def khop_strength(
    pattern: Float[Tensor, "*axes query key"], hops: Int[Tensor, "query key"]
) -> tuple[Float[Tensor, "*axes hop"], Float[Tensor, "*axes hop"]]:
    """Mean attention to each ring, and that divided by the cells of the ring.

    Args:
        pattern: attention; rows that are NaN do not count.
        hops: distance of each key from each query; a ring is the keys at one distance.

    Returns:
        (mass, mass per cell over the queries that have the ring), NaN where no query has it.
    """
    rings = hops.to(pattern.device)
    n_hops = int(rings.max()) + 1
    mass = pattern.new_zeros(*pattern.shape[:-1], n_hops).scatter_add_(-1, rings.expand_as(pattern), pattern)
    cells = pattern.new_zeros(len(rings), n_hops).scatter_add_(-1, rings, pattern.new_ones(rings.shape))
    return mass.nanmean(-2), (mass / cells.masked_fill(cells == 0, torch.nan)).nanmean(-2)


def grid_hops(grid: PatchGrid) -> Int[Tensor, "patch patch"]:
    """Chebyshev distance of every two patches."""
    rows, columns = ((one[:, None] - one).abs() for one in (grid.row, grid.column))
    return torch.maximum(rows, columns)


def between_patches(
    patterns: Float[Tensor, "image head query key"], grid: PatchGrid
) -> Float[Tensor, "image head patch patch"]:
    """Patterns without CLS and registers, rows renormalised; NaN where a patch attends to these alone."""
    patches = patterns[..., grid.n_prefix :, grid.n_prefix :]
    return patches / patches.sum(-1, keepdim=True).masked_fill(patches.sum(-1, keepdim=True) == 0, torch.nan)


def _ring_of_tokens(call: AttentionCall, max_hop: int) -> dict[str, Tensor]:
    causal = visible_keys(call, None).causal
    behind = list(range(max_hop + 1))
    ahead = [] if causal else [-hop for hop in behind[1:]]
    stripes = call_stats(call, offsets=[*behind, *ahead]).stripes
    before, after = stripes[: max_hop + 1], stripes[max_hop + 1 :]
    found = {}
    for hop in behind:
        ring = before[hop : hop + 1] if causal or hop == 0 else torch.stack([before[hop], after[hop - 1]])
        mass = ring.nansum(0)
        found[f"mass {hop}"] = mass
        found[f"per_cell {hop}"] = mass / (~ring.isnan()).sum(0).float().masked_fill(ring.isnan().all(0), torch.nan)
    return found
