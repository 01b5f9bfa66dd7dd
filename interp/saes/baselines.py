"""What an SAE has to beat: as many numbers a token, found without training.

Both baselines are ordinary SAEs, so that everything that takes an SAE takes them.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.model import Model
from interp.patching.batching import batches
from interp.patching.progress import progress_bar
from interp.saes.activations import gather
from interp.saes.architectures import make
from interp.saes.relu import ReLUSAE
from interp.saes.sae import SAE
from interp.saes.splice import counted, sites_of

_TOKENS_AT_ONCE = 4096
"""Whose features are held together while the scale of a random decoder is fitted."""


@torch.no_grad()
def pca(activations: Float[Tensor, "token d"], k: int, *, site: str | None = None) -> SAE:
    """Projection on the first k principal components: the best that any k directions, the same for all tokens, can do.

    As a ReLU SAE of 2k features, each component and its opposite, of which exactly k are active in a token (k
    coordinates, none of them 0).

    Args:
        activations: what it is fitted to, in float64.
        k: rank: the L0 of the SAE that it stands beside.
        site: where it is to read.

    Raises:
        ValueError: if k is not a number of directions, or a single token has no variance.
    """
    _check(len(activations), k, activations.shape[1], "dimensions")
    centred = activations.double()
    mean = centred.mean(0)
    centred = centred - mean
    # Eigenvalues come in ascending order.
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(-1)[:, :k]
    sae = ReLUSAE(
        len(mean), 2 * k, l1=0.0, site=site, metadata={"baseline": f"PCA of rank {k}", "n_tokens": len(centred)}
    ).to(activations.device)
    sae.W_enc.copy_(torch.cat([directions, -directions], dim=1))
    sae.W_dec.copy_(sae.W_enc.T)
    sae.b_dec.copy_(mean)
    return sae


@torch.no_grad()
def random_decoder(
    activations: Float[Tensor, "token d"], k: int, d_sae: int, *, site: str | None = None, seed: int = 0
) -> SAE:
    """A dictionary of random directions, of which each token uses the k that it has most of.

    As a TopK SAE whose encoder is its decoder transposed. Directions are not orthogonal, so that their parts add up to
    too much; one factor for all, the best in the least-squares sense, makes up for that.

    Args:
        activations: what mean and factor are fitted to.
        k: features a token: the L0 of the SAE that it stands beside.
        d_sae: number of directions: that of the SAE.
        site: where it is to read.
        seed: of the directions.

    Raises:
        ValueError: if k is not a number of features, or a single token has no variance.
    """
    _check(len(activations), k, d_sae, "features")
    mean = activations.double().mean(0)
    metadata = {"baseline": f"random decoder, k = {k}", "n_tokens": len(activations)}
    sae = make("topk", len(mean), d_sae, seed=seed, k=k, b_dec=mean, site=site, metadata=metadata)
    sae = sae.to(activations.device)
    dot, square = 0.0, 0.0
    for some in activations.float().split(_TOKENS_AT_ONCE):
        found = sae.encode(some).double() @ sae.W_dec.double()
        dot += float(((some.double() - mean) * found).sum())
        square += float(found.square().sum())
    sae.W_dec.mul_(dot / square if square else 1.0)
    return sae


@torch.no_grad()
def baselines(
    model: Model,
    sae: SAE,
    tokens: Int[Tensor, "prompt pos"],
    *,
    k: int | None = None,
    exclude: Bool[Tensor, "prompt pos"] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> dict[str, SAE]:
    """Both baselines for an SAE, at as many features a token as it has on these tokens.

    Costs one forward pass a prompt, as far as the site; holds the activations of all tokens there.

    Args:
        model: the model.
        sae: the SAE; of a transcoder, the baselines reconstruct the target.
        tokens: texts of one length to fit to: not those of the evaluation, if that is to be fair to the SAE.
        k: instead of the SAE's own L0 (rounded, at least 1 and at most the width).
        exclude: tokens left out (True), as in `evaluate`.
        seed: of the random directions.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        "pca" and "random".

    Raises:
        ValueError: if the SAE, `exclude` or k does not fit, or too few tokens are left.
    """
    source, target = sites_of(model, sae)
    kept = counted(tokens, exclude)
    _check(int(kept.sum()), k, sae.d_out, "dimensions")
    activations, n_active = [], 0
    with progress_bar(len(tokens), "activations for the baselines", "prompt", progress=progress) as bar:
        for rows in batches(len(tokens), tokens.shape[1], batch_size):
            found = gather(model, tokens[rows].to(model.device), list(dict.fromkeys((source, target))))
            activations.append(found[target][kept[rows].to(found[target].device)])
            if k is None:
                inputs = found[source][kept[rows].to(found[source].device)]
                n_active += int((sae.encode(inputs.to(sae.dtype)) != 0).sum())
            bar.update(len(found[target]))
    fitted_to = torch.cat(activations)
    if k is None:
        k = min(max(round(n_active / len(fitted_to)), 1), sae.d_out)
    return {
        "pca": pca(fitted_to, k, site=str(target)),
        "random": random_decoder(fitted_to, min(k, sae.d_sae), sae.d_sae, site=str(target), seed=seed),
    }


def _check(n_tokens: int, k: int | None, most: int, what: str) -> None:
    if k is not None and not 1 <= k <= most:
        raise ValueError(f"k={k} is outside 1..{most}, the number of {what}")
    if n_tokens < 2:
        raise ValueError(f"{n_tokens} token has no variance to explain; give two or more")
