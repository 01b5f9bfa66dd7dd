"""How much of a head's output comes from one segment of the input: an image, a passage, the demonstrations.

1. Run the input, and run it again with the segment removed (not blanked: later positions move up).
2. Take every head's z at the last position, the one that predicts the next token, in both.
3. Their distance is the head's divergence (VHD, where the segment is an image); 0 means the head ignored the segment.

Euclidean distance favours heads whose outputs are large anyway: cosine, relative and whitened distance are controls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from interp.model import Model, Site
from interp.model.hooks import Run, Tap, tapped
from interp.model.inputs import Prompts
from interp.patching.labels import model_provenance

Distance = Literal["l2", "cosine", "relative", "whitened"]
Sigma = Literal["sample", "population"]

ACTIVATION = "ablated_activation"
"""Coordinate of a divergence: the squared norm of z without the segment (TA in the paper)."""


def divergence(
    model: Model,
    full: Prompts,
    ablated: Prompts,
    *,
    distance: Distance = "l2",
    position: int = -1,
    tower: str = "",
    reference: Prompts | None = None,
    shrinkage: float = 0.1,
    per_prompt: bool = False,
) -> xr.DataArray:
    """Distance between every head's z with and without a segment of the input.

    Costs one forward pass of each input (all prompts in one batch), and one of `reference` for whitened distance.

    Args:
        model: the model.
        full: prompts with the segment, as the model takes them: text, token ids or a mapping of inputs.
        ablated: the same prompts without it; lengths may differ, also among the prompts of either input.
        distance: "l2", as published (not squared); "cosine", "relative" or "whitened": see `head_distance`.
        position: where z is read in both inputs, counted from each prompt's end if negative, else from its start.
        tower: "vision." for the heads of a vision tower, whose rows are images.
        reference: prompts whose z, over all positions, say how each head varies, for whitened distance; `full` by
            default.
        shrinkage: of the covariance behind whitened distance: see `head_covariance`.
        per_prompt: keep a leading `prompt` axis instead of the mean.

    Returns:
        DataArray [layer, head]. Its coordinate `ablated_activation` is the squared norm of z without the segment, which
        the outlier rule needs. Heads whose distance is undefined are NaN.

    Raises:
        ValueError: if the two inputs have different numbers of prompts, or are padded on the right.

    Source: He et al. 2024 (arXiv 2412.13949), Eq. 4. Checked against hand-wired heads in
    tests/heads/test_divergence.py.
    """
    if distance not in get_args(Distance):
        raise ValueError(f"distance={distance!r}; it is one of {', '.join(get_args(Distance))}")
    check_pair(full, ablated)
    covariance = None
    if distance == "whitened":
        base = full if reference is None else reference
        covariance = head_covariance(model, base, shrinkage=shrinkage, tower=tower)
    with_segment, without = (_head_outputs(model, prompts, position, tower) for prompts in (full, ablated))
    found = head_distance(with_segment, without, distance=distance, covariance=covariance)
    activation = without.square().sum(-1)
    n_prompts = len(found)
    if not per_prompt:
        found, activation = found.mean(0), activation.mean(0)
    dims = ("prompt", "layer", "head") if per_prompt else ("layer", "head")
    return xr.DataArray(
        found.cpu().numpy(),
        dims=dims,
        coords={
            **{dim: range(size) for dim, size in zip(dims, found.shape, strict=True)},
            ACTIVATION: (dims, activation.cpu().numpy()),
        },
        name="divergence",
        attrs={
            **model_provenance(model),
            "method": "divergence",
            "distance": distance,
            "position": position,
            "tower": tower,
            "n_prompts": n_prompts,
            **({"shrinkage": shrinkage} if distance == "whitened" else {}),
        },
    )


def head_distance(
    full: Float[Tensor, "*batch head d_head"],
    ablated: Float[Tensor, "*batch head d_head"],
    *,
    distance: Distance = "l2",
    covariance: Float[Tensor, "*#batch head d_head d_head"] | None = None,
) -> Float[Tensor, "*batch head"]:
    """Distance between two outputs z of each head, in float32.

    With Δ = z_full − z_ablated:

    * "l2": ‖Δ‖;
    * "cosine": 1 − cos(z_full, z_ablated); NaN where either is zero;
    * "relative": ‖Δ‖ / ‖z_full‖; NaN where z_full is zero;
    * "whitened": √(Δᵀ C⁻¹ Δ), in standard deviations of the head's own output; NaN where C is singular.

    Args:
        full: z with the segment.
        ablated: z without it.
        distance: which.
        covariance: C, for "whitened" only: `head_covariance`.

    Raises:
        ValueError: for a covariance that is missing or not wanted.
    """
    if (covariance is not None) != (distance == "whitened"):
        raise ValueError(f"a covariance belongs to distance='whitened', and to no other; distance is {distance!r}")
    full, ablated = full.float(), ablated.float()
    difference = full - ablated
    if distance == "cosine":
        norms = full.norm(dim=-1) * ablated.norm(dim=-1)
        return 1 - (full * ablated).sum(-1) / norms
    if distance == "relative":
        norms = full.norm(dim=-1)
        return (difference.norm(dim=-1) / norms).masked_fill(norms == 0, torch.nan)
    if covariance is None:
        return difference.norm(dim=-1)
    factor, failed = torch.linalg.cholesky_ex(covariance.double())
    whitened = torch.linalg.solve_triangular(factor, difference.double()[..., None], upper=False)
    return whitened[..., 0].norm(dim=-1).masked_fill(failed != 0, torch.nan).float()


def head_covariance(
    model: Model, prompts: Prompts, *, shrinkage: float = 0.1, tower: str = ""
) -> Float[Tensor, "layer head d_head d_head"]:
    """Covariance of every head's z over all positions of some prompts, shrunk towards a multiple of the identity.

    (1 − s) C + s · tr(C)/d · I, with s the shrinkage: without it, fewer positions than d_head leave C singular. Costs
    one forward pass; padding does not count.

    Args:
        model: the model.
        prompts: prompts as the model takes them, at least two positions in all.
        shrinkage: 0 (none) to 1 (a multiple of the identity: whitened distance is then l2 in the head's own scale).
        tower: "vision." for the heads of a vision tower.

    Raises:
        ValueError: if the shrinkage is outside 0..1.
    """
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage={shrinkage}; it runs from 0 (none) to 1 (a multiple of the identity)")
    found: list[Tensor] = []

    def see(z: Tensor, run: Run) -> None:
        rows = z.flatten(0, 1)
        if run.n_padding is not None:
            columns = torch.arange(z.shape[1], device=z.device)
            rows = z[columns >= run.n_padding[:, None].to(z.device)]
        centred = rows.double() - rows.double().mean(0)
        found.append(torch.einsum("nhd,nhe->hde", centred, centred) / (len(rows) - 1))

    with tapped(model.anatomy, [Tap(site, see) for site in _z_sites(model, tower)]):
        model(prompts, logits_to_keep=1)
    covariance = torch.stack([one.to(found[0].device) for one in found])
    scale = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return ((1 - shrinkage) * covariance + shrinkage * scale[..., None, None] * identity).float()


def t_vhd(divergence: xr.DataArray, k: int = 3) -> xr.DataArray:
    """Sum over layers of the k largest divergences of each layer: how much an answer owes to the segment.

    Args:
        divergence: [layer, head], or [prompt, layer, head] for one value a prompt.
        k: heads a layer.

    Compare answers to prompts of one wording only: in the zoo's `digits` it tells prompts that ask for the picture from
    prompts that do not (AUC above .9), but among pictures of one wording that are too faint to read it is higher, not
    lower, where the answer is a guess.

    Raises:
        ValueError: if a layer has fewer than k heads.

    Source: He et al. 2024 (arXiv 2412.13949), Eq. 5, which does not state k.
    """
    n_heads = divergence.sizes["head"]
    if not 1 <= k <= n_heads:
        raise ValueError(f"k={k}; this model has {n_heads} heads a layer, so k runs 1..{n_heads}")
    values = _tensor(divergence).topk(k, dim=-1).values.sum((-2, -1))
    blank = divergence.reset_coords(drop=True).isel(layer=0, head=0, drop=True)
    return blank.copy(data=values.numpy()).rename("t_vhd").assign_attrs(method="t_vhd", k=k)


def outlier_heads(divergence: xr.DataArray, *, sigma: Sigma = "sample") -> xr.DataArray:
    """Heads whose output surges where the segment is absent: they answer to its absence, not to it.

    Both the divergence and the activation without the segment lie above mean + one standard deviation over the heads of
    the layer.

    Args:
        divergence: what `divergence` returned, with its coordinate `ablated_activation`.
        sigma: standard deviation of a sample (n − 1) or of the population (n); the paper does not say which.

    Returns:
        Bool, dims as given.

    Raises:
        ValueError: if the coordinate is gone.

    Source: He et al. 2024 (arXiv 2412.13949), section on negative vision sensitivity.
    """
    return _flags(divergence, are_outliers(_tensor(divergence), _activation(divergence), sigma=sigma), "outlier_heads")


def select_heads(divergence: xr.DataArray, *, outliers: bool = True, sigma: Sigma = "sample") -> xr.DataArray:
    """The heads of each layer whose divergence is strictly above the layer's median (the lower middle value).

    Without ties that is half of them; of an odd number, the smaller half.

    Args:
        divergence: what `divergence` returned.
        outliers: count the divergence of outliers (`outlier_heads`) as 0 first, as published. False: leave them in.
        sigma: of the outlier rule.

    Returns:
        Bool, dims as given.

    Raises:
        ValueError: if `divergence` has lost the coordinate that the outlier rule needs.

    Source: He et al. 2024 (arXiv 2412.13949).
    """
    activation = _activation(divergence) if outliers else None
    return _flags(divergence, above_median(_tensor(divergence), activation, sigma=sigma), "select_heads")


def are_outliers(
    divergence: Float[Tensor, "*batch head"], activation: Float[Tensor, "*batch head"], *, sigma: Sigma = "sample"
) -> Bool[Tensor, "*batch head"]:
    """`outlier_heads` on tensors; the last axis is the heads of one layer."""
    if sigma not in get_args(Sigma):
        raise ValueError(f"sigma={sigma!r}; it is one of {', '.join(get_args(Sigma))}")
    correction = 1 if sigma == "sample" and divergence.shape[-1] > 1 else 0
    high = [
        values > values.mean(-1, keepdim=True) + values.std(-1, keepdim=True, correction=correction)
        for values in (divergence, activation)
    ]
    return high[0] & high[1]


def above_median(
    divergence: Float[Tensor, "*batch head"],
    activation: Float[Tensor, "*batch head"] | None,
    *,
    sigma: Sigma = "sample",
) -> Bool[Tensor, "*batch head"]:
    """`select_heads` on tensors; without an activation no head counts as an outlier."""
    if activation is not None:
        divergence = divergence.masked_fill(are_outliers(divergence, activation, sigma=sigma), 0)
    return divergence > divergence.median(-1, keepdim=True).values


def without_segment(prompt: str, segment: str) -> str:
    """A prompt without one segment of its text, such as a context sentence: the ablated input of `divergence`.

    Nothing else is touched: a space that should go with the segment belongs into it.

    Raises:
        ValueError: unless the segment occurs exactly once, and leaves something behind.
    """
    count = prompt.count(segment) if segment else 0
    if count != 1:
        raise ValueError(f"the segment {segment!r} occurs {count} times in the prompt {prompt!r}; it must occur once")
    if prompt == segment:
        raise ValueError("the segment is the whole prompt: nothing would be left to run")
    return prompt.replace(segment, "")


def check_pair(full: Prompts, ablated: Prompts) -> None:
    """Raise unless the prompts of two inputs correspond, and both end where their last column does.

    Raises:
        ValueError: if the numbers of prompts differ, or a mapping of inputs is padded on the right.
    """
    counts = [_count(prompts) for prompts in (full, ablated)]
    if None not in counts and counts[0] != counts[1]:
        raise ValueError(f"full has {counts[0]} prompts and ablated {counts[1]}; each prompt needs its own counterpart")
    for name, prompts in (("full", full), ("ablated", ablated)):
        mask = prompts.get("attention_mask") if isinstance(prompts, Mapping) else None
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(
                f"{name} is padded on the right, so its prompts end in different columns; pad on the left "
                "(padding_side='left' for the tokenizer or processor)"
            )


def _count(prompts: Prompts) -> int | None:
    """How many prompts an input holds; None where only the model can tell (pixels alone)."""
    if isinstance(prompts, str):
        return 1
    if isinstance(prompts, Mapping):
        return len(prompts["input_ids"]) if "input_ids" in prompts else None
    return 1 if isinstance(prompts, Tensor) and prompts.dim() == 1 else len(prompts)


def _z_sites(model: Model, tower: str) -> list[Site]:
    return model.site_names(f"{tower}blocks.*.attn.hook_z")


def _head_outputs(
    model: Model, prompts: Prompts, position: int, tower: str
) -> Float[Tensor, "prompt layer head d_head"]:
    """Every head's z at one position."""
    sites = _z_sites(model, tower)
    _, cache = model.run_with_cache(prompts, sites, positions=position, dtype=torch.float32, logits_to_keep=1)
    return torch.stack([cache[site][:, 0].to(cache[sites[0]].device) for site in sites], dim=1)


def _tensor(divergence: xr.DataArray) -> Tensor:
    return torch.from_numpy(divergence.transpose(..., "layer", "head").values)


def _activation(divergence: xr.DataArray) -> Tensor:
    if ACTIVATION not in divergence.coords:
        raise ValueError(
            f"the outlier rule needs the coordinate {ACTIVATION!r} that interp.heads.divergence sets (a mean over "
            "prompts taken by hand drops it); without the rule: outliers=False"
        )
    return _tensor(divergence[ACTIVATION])


def _flags(divergence: xr.DataArray, flags: Tensor, method: str) -> xr.DataArray:
    like = divergence.reset_coords(drop=True).transpose(..., "layer", "head")
    return like.copy(data=flags.numpy()).rename(method).assign_attrs(method=method)
