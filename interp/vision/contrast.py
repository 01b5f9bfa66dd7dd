"""Where a question makes a model look that a generic instruction does not: CARVE's contrastive attention map."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.heads.attention_calls import attention_modules, pattern_rows
from interp.model import Model
from interp.model.attention import AttentionCall, AttentionResult, attention_wrapped
from interp.patching.labels import model_provenance
from interp.vision.token_map import placed_image

SMOOTHING = 0.1
"""λ as a share of the mean attention to a piece, where the caller gives none."""


@torch.no_grad()
def contrast_map(
    model: Model,
    question: Int[Tensor, "*one pos"],
    generic: Int[Tensor, "*other generic_pos"],
    *,
    layers: Sequence[int] | None = None,
    steps: int = 1,
    first_step: int = 0,
    smoothing: float | None = None,
    image: int = 0,
) -> xr.Dataset:
    """Attention to an image under a question, relative to that under a generic instruction, by layer and step.

    At each step of (greedy) generation the attention of the last position to the pieces of the image is averaged over
    heads and renormalised over the pieces: A_Q for the question, A_G for the instruction. Then

        contrast = Σ_t w_t Σ_l A_Q / (A_G + λ),    w_t = t − t₀ + 1,

    over the chosen layers and the steps t ≥ t₀: later steps, in which more is decided, count more; layers alike.

    CARVE uses layers 20 to 25 of 32 (of LLaVA-1.5) and the steps up to the end of the answer. What λ is, and whether
    maps are renormalised, has not been checked against the paper. Costs a generation of `steps` tokens for each prompt.

    Args:
        model: a model that sees and reads.
        question: token ids of one prompt with the image and the question.
        generic: token ids of one prompt with the same image and an instruction such as "describe the image".
        layers: layers of the text model; None: from 5/8 of the depth on, six of them where there are 32.
        steps: tokens to generate; fewer are used if the model ends either answer earlier.
        first_step: t₀, from 0.
        smoothing: λ, more than 0; None: a tenth of the mean share 1 / pieces. A piece that the instruction leaves out
            altogether gets at most A_Q / λ.
        image: which image of the prompts.

    Returns:
        Dataset of `contrast` [row, column]; `question` and `generic` [layer, step, row, column], the two maps; and
        `entropy` [layer, step], in nats, of the question's map: CARVE's measure of how scattered attention is, at the
        last step. NaN where a chosen layer gives the image no attention at all, as behind a sliding window.

    Raises:
        ValueError: if a prompt lacks the image, the images differ or have no grid, layers are out of range, or no step
            is left.

    Source: the formula is that of CARVE (arXiv 2509.06461), without its cropping of the image and second query. Checked
    by hand on planted maps in tests/vision/test_contrast.py.
    """
    started = time.perf_counter()
    chosen = _layers(model, layers)
    if not 0 <= first_step < steps:
        raise ValueError(f"first_step={first_step}, steps={steps}; steps run from first_step, 0 or more, to steps - 1")
    grid = _shared_grid(model, question, generic, image)
    smoothing = SMOOTHING / (grid[0] * grid[1]) if smoothing is None else smoothing
    if smoothing <= 0:
        raise ValueError(f"smoothing={smoothing}; it keeps the quotient finite, so it is more than 0")
    maps = [_maps(model, prompt, chosen, steps, image) for prompt in (question, generic)]
    n_steps = min(one.shape[1] for one in maps)
    if n_steps <= first_step:
        raise ValueError(f"the model ended an answer after {n_steps} steps; first_step={first_step} leaves none")
    asked, told = (one[:, first_step:n_steps] for one in maps)
    weights = torch.arange(1, asked.shape[1] + 1, dtype=asked.dtype)
    folded = ("layer", "step", "row", "column")
    return xr.Dataset(
        {
            "contrast": (folded[2:], contrast(asked, told, weights, smoothing).view(grid).numpy()),
            "question": (folded, asked.unflatten(-1, grid).numpy()),
            "generic": (folded, told.unflatten(-1, grid).numpy()),
            "entropy": (folded[:2], torch.special.entr(asked).sum(-1).numpy()),
        },
        coords={
            "layer": chosen,
            "step": range(first_step, n_steps),
            "row": range(grid[0]),
            "column": range(grid[1]),
            "weight": ("step", weights.numpy()),
        },
        attrs={
            **model_provenance(model),
            "method": "contrast_map",
            "smoothing": smoothing,
            "seconds": time.perf_counter() - started,
        },
    )


def contrast(
    question: Float[Tensor, "layer step piece"],
    generic: Float[Tensor, "layer step piece"],
    step_weights: Float[Tensor, " step"],
    smoothing: float,
) -> Float[Tensor, " piece"]:
    """Σ_t w_t Σ_l A_Q / (A_G + λ)."""
    return torch.einsum("lsp,s->p", question / (generic + smoothing), step_weights)


def salient_regions(values: xr.DataArray, *, share: float = 0.4, k: int = 2) -> xr.DataArray:
    """The cells of a map worth keeping: its highest ones, as far as they lie in the k strongest connected regions.

    Args:
        values: [row, column], such as `contrast_map(...)["contrast"]`.
        share: share of the cells that are kept before regions are formed, over 0 and up to 1; CARVE uses 0.2 to 0.6.
            Cells that tie with the last of them are kept too.
        k: how many regions; cells that touch at a side belong together, and a region is as strong as the sum of its
            values. CARVE uses 2 or 3.

    Returns:
        Booleans [row, column].

    Raises:
        ValueError: for a share outside 0..1, k below 1, or values that are NaN.

    Source: the top share and k regions of CARVE (arXiv 2509.06461); how it ranks regions has not been checked.
    """
    from scipy import ndimage

    if values.ndim != 2 or bool(values.isnull().any()):
        raise ValueError("give a map [row, column] without NaN")
    if not 0 < share <= 1 or k < 1:
        raise ValueError(f"share={share}, k={k}; the share is over 0 and up to 1, and at least one region is kept")
    n_cells = max(1, round(share * values.size))
    threshold = np.sort(values.values, axis=None)[-n_cells]
    regions, n_regions = ndimage.label(values.values >= threshold)
    strength = ndimage.sum_labels(values.values, regions, range(1, n_regions + 1))
    kept = np.argsort(-strength, kind="stable")[:k] + 1
    return values.copy(data=np.isin(regions, kept)).assign_attrs(share=share, k=k).rename("salient")


def _layers(model: Model, layers: Sequence[int] | None) -> list[int]:
    if layers is None:
        first, last = (min(round(model.n_layers * share / 32), model.n_layers - 1) for share in (20, 25))
        return list(range(first, last + 1))
    outside = [layer for layer in layers if not 0 <= layer < model.n_layers]
    if outside or not layers:
        raise ValueError(f"layers={list(layers)}: give some of layers 0..{model.n_layers - 1}")
    return list(layers)


def _shared_grid(model: Model, question: Tensor, generic: Tensor, image: int) -> tuple[int, int]:
    shown = [placed_image(model, prompt, image)[1] for prompt in (question, generic)]
    if shown[0].id != shown[1].id:
        raise ValueError(f"image {image} of the question is not that of the generic instruction")
    if shown[0].grid is None:
        raise ValueError(f"image {image} has {shown[0].n_tokens} pieces that are not one grid")
    return shown[0].grid


def _maps(
    model: Model, prompt: Tensor, layers: Sequence[int], steps: int, image: int
) -> Float[Tensor, "layer step piece"]:
    """Attention of the last position to the pieces of the image at each step, averaged over heads, as shares."""
    first, placed = placed_image(model, prompt, image)
    pieces = slice(first, first + placed.n_tokens)
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def see(call: AttentionCall, *, layer: int) -> AttentionResult:
        last = torch.tensor([call.query.shape[2] - 1])
        row = pattern_rows(call, range(call.query.shape[1]), last)[0, :, 0].mean(0).cpu()
        # The cache of a sliding-window layer has dropped what lies before the window, which gets no attention.
        dropped = prompt.numel() + len(found[layer]) - len(row)
        found[layer].append(torch.nn.functional.pad(row, (dropped, 0))[pieces])
        return call.run()

    seen = {module: partial(see, layer=layer) for layer, module in attention_modules(model, layers).items()}
    with attention_wrapped(seen):
        model.generate(prompt.reshape(1, -1), max_new_tokens=steps)
    maps = torch.stack([torch.stack(found[layer]) for layer in layers])
    total = maps.sum(-1, keepdim=True)
    return maps / total.masked_fill(total == 0, torch.nan)
