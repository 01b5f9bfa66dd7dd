"""How attention divides between text and image: for every head, from what to what."""

from __future__ import annotations

import time

import torch
import xarray as xr
from jaxtyping import Bool, Int
from torch import Tensor

from interp.heads.attention_calls import call_stats
from interp.heads.rows import Measure, row_means, token_groups
from interp.model import Model
from interp.model.attention import AttentionCall
from interp.patching.labels import model_provenance, provenance
from interp.tasks import Task

KINDS = ("image", "text")


def modality_mass(
    model: Model,
    prompts: Task | Int[Tensor, "prompt pos"],
    *,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Attention from image and text to image and text, averaged over queries and prompts.

    The mass of a row on all image (text) positions; rows add up to 1 over `to` (to less with learned sink logits). In a
    causal model text before an image cannot attend to it and counts with 0. Costs one forward pass a prompt.

    Args:
        model: the model.
        prompts: a task (its clean prompts) or token ids with images.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        DataArray [from, to, layer, head]; NaN where there are no such rows.

    Raises:
        ValueError: if no prompt has an image.
    """
    started = time.perf_counter()
    groups = token_groups(prompts)
    if not any(bool(model.images.mask(tokens).any()) for tokens in groups):
        raise ValueError("no prompt has an image: give tokens of model.to_tokens(text, images=[...])")
    means = row_means(
        model,
        [(tokens, _by_kind(model.images.mask(tokens))) for tokens in groups],
        batch_size=batch_size,
        progress=progress,
    )
    values = torch.stack([torch.stack([means[f"{one} to {other}"][0] for other in KINDS]) for one in KINDS])
    about = provenance(model, prompts) if isinstance(prompts, Task) else model_provenance(model)
    return xr.DataArray(
        values.numpy(),
        dims=("from", "to", "layer", "head"),
        coords={"from": list(KINDS), "to": list(KINDS), "layer": range(model.n_layers), "head": range(model.n_heads)},
        name="attention",
        attrs={**about, "method": "modality_mass", "seconds": time.perf_counter() - started},
    )


def _by_kind(is_image: Bool[Tensor, "prompt pos"]) -> Measure:
    def measure(call: AttentionCall, rows: slice) -> dict[str, Tensor]:
        image = is_image[rows]
        stats = call_stats(call, key_sets=torch.stack([image, ~image]))
        queries = {"image": image, "text": ~image}
        return {
            f"{one} to {other}": stats.mass[number].masked_fill(~queries[one][:, None].to(stats.mass.device), torch.nan)
            for one in KINDS
            for number, other in enumerate(KINDS)
        }

    return measure
