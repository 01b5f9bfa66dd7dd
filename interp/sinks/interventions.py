"""What a massive activation is good for: overwrite it at one place and see what becomes of the prediction."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.model import Edit, Model, Site
from interp.model.edit import resolve_positions
from interp.patching.batching import batches
from interp.patching.labels import model_provenance
from interp.patching.progress import progress_bar
from interp.sinks.dimensions import Dimensions, dimension_indices

INTERVENTIONS = ("baseline", "zero", "mean", "random")
_NO_WORD = -1


@torch.no_grad()
def intervene(
    model: Model,
    tokens: Int[Tensor, "prompt pos"],
    dimensions: Dimensions,
    layer: int,
    *,
    positions: Sequence[int] = (0,),
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Perplexity after overwriting a few values of one block's output, beside that of the untouched model.

    * "zero": they become 0;
    * "mean": each becomes its mean over the prompts, at its dimension and position;
    * "random": as many other dimensions, drawn with the seed, become 0 at the same positions.

    If "zero" ruins the model and "mean" does not, the activation acts as a constant: a bias. Costs five forward passes
    a prompt, the first only to read the mean.

    Args:
        model: the model.
        tokens: prompts of one length.
        dimensions: which values, such as `sink_dimensions(model)`.
        layer: after which block.
        positions: at which tokens.
        seed: of the random dimensions.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset with `nll` [intervention, prompt], the mean negative log-likelihood of a prompt's tokens from the second
        on, in nats, and `perplexity` [intervention], exp of its mean over prompts. Attr `random_dimensions` says which.

    Raises:
        ValueError: for a layer, position or dimension out of range, or more dimensions than can be matched by others.

    Source: Sun et al. 2024 (arXiv 2402.17762). Checked against plain PyTorch hooks in
    tests/sinks/test_interventions.py.
    """
    started = time.perf_counter()
    site = model.site_names(Site("resid_post", layer))[0]
    chosen = dimension_indices(dimensions, model.d_model)
    at = resolve_positions(list(positions), tokens.shape[1])
    if tokens.shape[1] < 2 or not len(tokens) or not len(chosen) or not at:
        raise ValueError("intervene needs prompts of two tokens at least, and one dimension and position at least")
    others = _other_dimensions(chosen, model.d_model, seed)
    mean = mean_over_prompts(model, tokens, site, batch_size)
    edits = {
        "baseline": [],
        "zero": [Edit(site, value=0.0, positions=at, neurons=chosen.tolist())],
        "mean": [Edit(site, value=mean, positions=at, neurons=chosen.tolist())],
        "random": [Edit(site, value=0.0, positions=at, neurons=others.tolist())],
    }
    found = []
    with progress_bar(len(INTERVENTIONS) * len(tokens), "intervening", "prompt", progress=progress) as bar:
        for name in INTERVENTIONS:
            with model.edited(edits[name]):
                found.append(mean_nll(model, tokens, batch_size))
            bar.update(len(tokens))
    nll = torch.stack(found)
    return xr.Dataset(
        {
            "nll": (("intervention", "prompt"), nll.numpy()),
            "perplexity": ("intervention", nll.mean(1).exp().numpy()),
        },
        coords={"intervention": list(INTERVENTIONS), "prompt": range(len(tokens))},
        attrs={
            **model_provenance(model),
            "method": "intervene",
            "layer": layer,
            "dimensions": chosen.tolist(),
            "random_dimensions": others.tolist(),
            "positions": at,
            "seed": seed,
            "seconds": time.perf_counter() - started,
        },
    )


def mean_nll(
    model: Model, tokens: Int[Tensor, "prompt pos"], batch_size: int | None = None
) -> Float[Tensor, " prompt"]:
    """Mean negative log-likelihood of each prompt's tokens from the second on, in nats (float64, on the CPU).

    Pieces of images are no words: they are read, not predicted.
    """
    found = []
    for rows in batches(len(tokens), tokens.shape[1], batch_size):
        batch = tokens[rows].to(model.device)
        logits = model(batch)[:, :-1].float()
        targets = batch[:, 1:].masked_fill(model.images.mask(batch[:, 1:]), _NO_WORD)
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, reduction="none", ignore_index=_NO_WORD
        )
        found.append((losses.double().sum(1) / (targets != _NO_WORD).sum(1)).cpu())
    return torch.cat(found)


def mean_over_prompts(
    model: Model, tokens: Int[Tensor, "prompt pos"], site: Site, batch_size: int | None = None
) -> Float[Tensor, "pos d_model"]:
    """Mean of a site over prompts, position by position, accumulated in float32."""
    total = torch.zeros(tokens.shape[1], model.d_model, device=model.device)
    for rows in batches(len(tokens), tokens.shape[1], batch_size):
        _, cache = model.run_with_cache(tokens[rows], site, logits_to_keep=1)
        total += cache[site].float().sum(0).to(total.device)
    return total / len(tokens)


def _other_dimensions(chosen: Int[Tensor, " dimension"], d_model: int, seed: int) -> Int[Tensor, " dimension"]:
    """As many dimensions, none of them chosen, drawn without replacement."""
    left = torch.tensor(sorted(set(range(d_model)) - set(chosen.tolist())))
    if len(left) < len(chosen):
        raise ValueError(f"{len(chosen)} of {d_model} dimensions leave too few others to compare with; give fewer")
    drawn = torch.randperm(len(left), generator=torch.Generator().manual_seed(seed))[: len(chosen)]
    return left[drawn]
