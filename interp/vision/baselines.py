"""Two maps of what matters, offered as baselines to compare with: attention rollout and NormGrad.

Attention rollout is not faithful: it looks at attention alone, neither at what is moved nor at what the output makes of
it. Compare it with effects of patching before reading anything into it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.heads.attention_calls import attention_modules, pattern_rows
from interp.model import Model, Site
from interp.model.attention import AttentionCall, AttentionResult, attention_wrapped
from interp.patching.batching import batches
from interp.patching.labels import model_provenance
from interp.patching.progress import progress_bar
from interp.vision.classes import Classifier, batch_labels, chosen_classes, class_logits
from interp.vision.patch_grid import Images, PatchGrid, image_batches, patch_grid, vision_tower
from interp.vision.tower_attention import by_layer_and_image

VARIANTS = ("norm_product", "product_norm", "gradient_norm", "product_sum")


def rollout(attention: Float[Tensor, "layer *axes query key"]) -> Float[Tensor, "*axes query key"]:
    """Attention multiplied through the layers: the product of ½(A + I), last layer first, each row normalised to 1.

    Source: Abnar & Zuidema 2020 (arXiv 2005.00928).
    """
    identity = torch.eye(attention.shape[-1], dtype=attention.dtype, device=attention.device)
    total = identity.expand_as(attention[0])
    for layer in attention:
        mixed = (layer + identity) / 2
        total = (mixed / mixed.sum(-1, keepdim=True)) @ total
    return total


def vision_rollout(
    model: Model, images: Images, *, batch_size: int | None = None, progress: bool | None = None
) -> xr.DataArray:
    """Attention rollout of a vision transformer, from CLS to every patch. Not faithful: a baseline.

    Heads are averaged. Without CLS, it is the mean over patches. Costs one forward pass an image; holds the patterns of
    all layers, heads averaged.

    Args:
        model: a vision model, or one that sees and reads.
        images: a mapping with `pixel_values`, or token ids with images in them.
        batch_size: images a forward pass; 8 by default.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        DataArray [image, patch] with the coordinates `row` and `column`; `fold_patches` makes it a map.

    Raises:
        ValueError: if there is no vision transformer or no image.
    """
    started = time.perf_counter()

    def measure(patterns: Tensor, grid: PatchGrid) -> Tensor:
        return patterns.mean(1)

    attention, grid = by_layer_and_image(model, images, measure, batch_size=batch_size, progress=progress)
    total = rollout(attention)[..., grid.n_prefix :]
    values = total[:, 0] if grid.n_prefix else total.mean(1)
    return xr.DataArray(
        values.numpy(),
        dims=("image", "patch"),
        coords={"image": range(len(values)), **grid.coords},
        name="rollout (not faithful)",
        attrs={**_attrs(model, "vision_rollout", started), "faithful": "no"},
    )


@torch.no_grad()
def attention_rollout(
    model: Model, tokens: Int[Tensor, "prompt pos"], *, batch_size: int | None = None, progress: bool | None = None
) -> xr.DataArray:
    """Attention rollout of a language model, from the last position to every position. Not faithful: a baseline.

    Heads are averaged. Costs one forward pass a prompt; holds the patterns of all layers of a batch, heads averaged.

    Args:
        model: the model; its text tower is read.
        tokens: token ids of prompts of one length, with images or without.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        DataArray [prompt, position]; `image_values` makes a map of it where the prompt has an image.
    """
    started = time.perf_counter()
    found: dict[int, Tensor] = {}

    def see(call: AttentionCall, *, layer: int) -> AttentionResult:
        rows = torch.arange(call.query.shape[2])
        found[layer] = pattern_rows(call, range(call.query.shape[1]), rows).mean(1)
        return call.run()

    seen = {
        module: partial(see, layer=layer) for layer, module in attention_modules(model, range(model.n_layers)).items()
    }
    parts = []
    with progress_bar(len(tokens), "attention rollout", "prompt", progress=progress) as bar, attention_wrapped(seen):
        for rows in batches(len(tokens), tokens.shape[1], batch_size):
            model.last_logits(tokens[rows])
            parts.append(rollout(torch.stack([found[layer] for layer in sorted(found)]))[:, -1].cpu())
            bar.update(len(tokens[rows]))
    return xr.DataArray(
        torch.cat(parts).numpy(),
        dims=("prompt", "position"),
        coords=_positions(model, tokens),
        name="rollout (not faithful)",
        attrs={**_attrs(model, "attention_rollout", started), "faithful": "no"},
    )


def norm_grad(
    activation: Float[Tensor, "*axes d_model"], gradient: Float[Tensor, "*axes d_model"]
) -> Float[Tensor, "variant *axes"]:
    """Saliency of each token by NormGrad and its variants, in the order of `VARIANTS`.

    * `norm_product`: ‖x‖ ‖g‖, NormGrad for a virtual 1×1 layer;
    * `product_norm`: ‖x ∘ g‖;
    * `gradient_norm`: ‖g‖;
    * `product_sum`: Σ x ∘ g, the signed one (gradient times input).

    Args:
        activation: x, a token's residual stream.
        gradient: g, the gradient of the metric at it.

    Source: Rebuffi et al. 2020, "There and Back Again" (arXiv 2004.02866) and its code, on tokens instead of pixels.
    """
    x, g = activation.float(), gradient.float()
    return torch.stack([x.norm(dim=-1) * g.norm(dim=-1), (x * g).norm(dim=-1), g.norm(dim=-1), (x * g).sum(-1)])


def combined_layers(values: Float[Tensor, "variant layer item token"]) -> Float[Tensor, "variant item token"]:
    """Product over layers, each layer's map first divided by its largest absolute value.

    The division changes the product of an image by a factor only, and keeps it from vanishing. Layers on which the
    metric does not depend (all 0: later ones than a model that reads takes its patches from) are left out.
    """
    largest = values.abs().amax(-1, keepdim=True)
    used = torch.where(largest > 0, values / largest, 1.0)
    return used.prod(1).masked_fill((largest == 0).all(1), torch.nan)


def vision_norm_grad(
    model: Model,
    images: Images,
    labels: Int[Tensor, " image"] | None = None,
    *,
    classifier: Classifier | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """NormGrad of every patch at the input of every layer of a vision transformer.

    The metric is the log-probability of the class. Costs a forward and a backward pass an image; holds the residual
    stream of all layers of a batch.

    Args:
        model: a vision model, or one that sees and reads (classes are then next tokens).
        images: a mapping with `pixel_values`, or token ids with images in them; one image a prompt.
        labels: the class of each image; None: the one that the model predicts.
        classifier: from what the model returns to class logits, for models without a classification head.
        batch_size: images a pass; 8 by default.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset of `saliency` [variant, layer, image, patch] (see `norm_grad`) and `combined` [variant, image, patch],
        the product over layers, with the coordinates `row` and `column`; `fold_patches` makes maps of them.

    Raises:
        ValueError: for labels that do not fit, or a model without classes.
    """
    started = time.perf_counter()
    tower = vision_tower(model)
    sites = [Site("resid_pre", layer, tower=tower) for layer in range(model.anatomy.towers[tower].n_layers)]
    prepared = image_batches(model, images, batch_size)
    parts, grids = [], []
    with progress_bar(len(prepared), "NormGrad", "batch", progress=progress) as bar:
        for batch, given in zip(prepared, batch_labels(prepared, labels), strict=True):

            def metric(output: Tensor, given: Tensor | None = given) -> Tensor:
                logits = class_logits(model, output, classifier)
                if logits is None:
                    raise ValueError(f"{model.name} predicts no classes; give classifier=...")
                return log_probability(logits, given)

            parts.append(_at_sites(model, batch, metric, sites, keep=int(tower != "")))
            grids.append(patch_grid(model, batch, parts[-1].shape[-1]))
            bar.update()
    values = torch.cat(parts, dim=2)[..., grids[0].n_prefix :]
    return _saliency(values, "image", "patch", grids[0].coords, _attrs(model, "vision_norm_grad", started))


def token_norm_grad(
    model: Model,
    tokens: Int[Tensor, "prompt pos"],
    labels: Int[Tensor, " _"] | None = None,
    *,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """NormGrad of every position at the input of every layer of a language model.

    The metric is the log-probability of the next token. Costs a forward and a backward pass a prompt.

    Args:
        model: the model; its text tower is read.
        tokens: token ids of prompts of one length, with images or without.
        labels: the next token of each prompt; None: the one that the model predicts.
        batch_size: prompts a pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset of `saliency` [variant, layer, prompt, position] (see `norm_grad`) and `combined`
        [variant, prompt, position], the product over layers; `image_values` makes maps of them.

    Raises:
        ValueError: for labels that do not fit.
    """
    started = time.perf_counter()
    if labels is not None and labels.shape != tokens.shape[:1]:
        raise ValueError(
            f"labels have the shape {tuple(labels.shape)}; give one token for each of {len(tokens)} prompts"
        )
    sites = [Site("resid_pre", layer) for layer in range(model.n_layers)]
    parts = []
    with progress_bar(len(tokens), "NormGrad", "prompt", progress=progress) as bar:
        for rows in batches(len(tokens), tokens.shape[1], batch_size):
            given = None if labels is None else labels[rows]

            def metric(output: Tensor, given: Tensor | None = given) -> Tensor:
                return log_probability(output[:, -1].float(), given)

            parts.append(_at_sites(model, tokens[rows], metric, sites, keep=1))
            bar.update(len(tokens[rows]))
    values = torch.cat(parts, dim=2)
    coords = _positions(model, tokens)
    return _saliency(values, "prompt", "position", coords, _attrs(model, "token_norm_grad", started))


def log_probability(logits: Float[Tensor, "row class"], classes: Int[Tensor, " row"] | None) -> Float[Tensor, " row"]:
    """Log-probability of the classes given, or of those predicted."""
    chosen = chosen_classes(logits, classes)
    return logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]


def _at_sites(
    model: Model, batch: Any, metric: Callable[[Tensor], Tensor], sites: list[Site], *, keep: int
) -> Float[Tensor, "variant layer item token"]:
    _, activations, gradients = model.run_with_gradients(batch, metric, sites, logits_to_keep=keep)
    return torch.stack([norm_grad(activations[site], gradients[site]).cpu() for site in sites], dim=1)


def _saliency(values: Tensor, item: str, token: str, coords: dict[str, Any], attrs: dict[str, Any]) -> xr.Dataset:
    return xr.Dataset(
        {
            "saliency": (("variant", "layer", item, token), values.numpy()),
            "combined": (("variant", item, token), combined_layers(values).numpy()),
        },
        coords={"variant": list(VARIANTS), "layer": range(values.shape[1]), item: range(values.shape[2]), **coords},
        attrs=attrs,
    )


def _positions(model: Model, tokens: Int[Tensor, "prompt pos"]) -> dict[str, Any]:
    labels = model.to_str_tokens(tokens[0]) if model.tokenizer is not None else [str(one) for one in tokens[0].tolist()]
    return {"prompt": range(len(tokens)), "position": range(tokens.shape[1]), "token": ("position", labels)}


def _attrs(model: Model, method: str, started: float) -> dict[str, Any]:
    return {**model_provenance(model), "method": method, "seconds": time.perf_counter() - started}
