"""How alike the attention patterns of two layers are, head by head.

Sinks make all patterns alike: with most of each row on the first token, any two layers look the same. Leaving sink
positions out shows what is left.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.heads.rows import token_groups
from interp.model import Model
from interp.patching.batching import batches
from interp.patching.labels import model_provenance, provenance
from interp.patching.progress import progress_bar
from interp.tasks import Task

Similarity = Literal["cosine", "jensen_shannon"]

BLOCK_BYTES = 2**26
"""Attention held at once; longer prompts are read in blocks of queries, each with a forward pass of its own."""


@torch.no_grad()
def layer_similarity(
    model: Model,
    prompts: Task | Int[Tensor, "prompt pos"],
    *,
    metric: Similarity = "cosine",
    exclude: Sequence[int] | Bool[Tensor, "prompt pos"] = (),
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Similarity of the attention patterns of every pair of layers, averaged over heads and prompts.

    * "cosine": of the two patterns as one long vector each; 1 = the same up to a factor, 0 = no key in common;
    * "jensen_shannon": divergence of two rows in bits, averaged over queries; 0 = the same, 1 = no key in common.

    Head h of one layer is compared with head h of the other, as where layers share their attention. The order of heads
    within a layer means nothing, so heads that have changed places count as different.

    Holds the patterns of all layers for a block of queries, 64 MB and a few copies; costs a forward pass a block, one a
    prompt for short ones.

    Args:
        model: the model.
        prompts: a task (its clean prompts) or token ids.
        metric: "cosine" or "jensen_shannon".
        exclude: key positions left out of all layers, such as a sink at [0], or True where one is, prompt by prompt
            (of a mask with layers, `any` over them). Rows are renormalised over the keys left; queries with none do not
            count.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        DataArray [layer, other]; NaN where no query is left in any head. Heads of prompts without one do not count.

    Raises:
        ValueError: for an unknown metric, or positions outside the prompts.
        SiteUnavailable: if the attention of this family cannot be read.

    Source: the cosine of EchoAtt (arXiv 2409.14595). Checked against loops over eager attentions in
    tests/heads/test_similarity.py.
    """
    started = time.perf_counter()
    if metric not in get_args(Similarity):
        raise ValueError(f"metric={metric!r}; it is one of {', '.join(get_args(Similarity))}")
    groups = token_groups(prompts)
    kept = [_kept_keys(tokens, exclude) for tokens in groups]
    total = torch.zeros(model.n_layers, model.n_layers, dtype=torch.float64)
    count = torch.zeros_like(total)
    n_prompts = sum(len(tokens) for tokens in groups)
    with progress_bar(n_prompts, "layer similarity", "prompt", progress=progress) as bar:
        for tokens, keys in zip(groups, kept, strict=True):
            for rows in batches(len(tokens), tokens.shape[1], batch_size):
                found = _one_batch(model, tokens[rows], keys[rows], metric).flatten(2)
                total += found.nansum(-1).cpu()
                count += (~found.isnan()).sum(-1).cpu()
                bar.update(len(tokens[rows]))
    about = provenance(model, prompts) if isinstance(prompts, Task) else model_provenance(model)
    layers = range(model.n_layers)
    return xr.DataArray(
        (total / count).float().numpy(),
        dims=("layer", "other"),
        coords={"layer": layers, "other": layers},
        name=metric,
        attrs={
            **about,
            "method": "layer_similarity",
            "metric": metric,
            "exclude": ["by prompt"] if isinstance(exclude, Tensor) else list(exclude),
            "n_prompts": n_prompts,
            "seconds": time.perf_counter() - started,
        },
    )


def _kept_keys(tokens: Tensor, exclude: Sequence[int] | Tensor) -> Bool[Tensor, "prompt pos"]:
    if isinstance(exclude, Tensor):
        if exclude.shape != tokens.shape:
            raise ValueError(
                f"exclude has the shape {tuple(exclude.shape)} and the prompts {tuple(tokens.shape)}; give one value a "
                "token, of prompts of one length"
            )
        return ~exclude
    kept = torch.ones(tokens.shape, dtype=torch.bool)
    for position in exclude:
        if not 0 <= position < tokens.shape[1]:
            raise ValueError(f"position {position} is outside the prompt; positions run 0..{tokens.shape[1] - 1}")
        kept[:, position] = False
    return kept


def _one_batch(
    model: Model, tokens: Tensor, kept: Tensor, metric: Similarity
) -> Float[Tensor, "layer other batch head"]:
    """The similarity of each pair of layers for every prompt and head; NaN where no query is left in both."""
    sums: list[Tensor] = []
    for shares in _blocks(model, tokens, kept):
        parts = _cosine_parts(shares) if metric == "cosine" else _divergence_parts(shares)
        sums = [one + part for one, part in zip(sums, parts, strict=True)] if sums else list(parts)
    if metric == "jensen_shannon":
        return sums[0] / sums[1]
    products, squares = sums
    return products / (squares * squares.transpose(0, 1)).sqrt()


def _blocks(model: Model, tokens: Tensor, kept: Tensor) -> Iterator[Float[Tensor, "layer batch head query key"]]:
    """Patterns of all layers for some queries at a time, rows renormalised over the keys kept, 0 where none is left."""
    length = tokens.shape[1]
    n_rows = max(1, BLOCK_BYTES // (4 * model.n_layers * model.n_heads * tokens.numel()))
    for start in range(0, length, n_rows):
        queries = slice(start, min(start + n_rows, length))
        _, cache = model.run_with_cache(tokens, "pattern", positions=queries, logits_to_keep=1)
        patterns = torch.stack([cache["pattern", layer].float().to(model.device) for layer in range(model.n_layers)])
        patterns *= kept[:, None, None].to(model.device)
        total = patterns.sum(-1, keepdim=True)
        yield torch.where(total > 0, patterns / total, 0)


def _cosine_parts(shares: Tensor) -> tuple[Tensor, Tensor]:
    """(inner products of each pair of layers, squared norm of the first over the rows that the second has too)."""
    has_row = (shares.sum(-1) > 0).double()
    products = torch.einsum("lbhqk,mbhqk->lmbh", shares, shares)
    squares = torch.einsum("lbhq,mbhq->lmbh", shares.square().sum(-1).double(), has_row)
    return products.double(), squares


def _divergence_parts(shares: Tensor) -> tuple[Tensor, Tensor]:
    """(sums of Jensen-Shannon divergences over the rows that both layers have, how many those are)."""
    has_row = shares.sum(-1) > 0
    entropy = torch.special.entr(shares).sum(-1)
    both = torch.einsum("lbhq,mbhq->lmbh", has_row.double(), has_row.double())
    sums = torch.zeros_like(both)
    for one in range(len(shares)):
        for other in range(one + 1, len(shares)):
            mixture = torch.special.entr((shares[one] + shares[other]) / 2).sum(-1)
            bits = (mixture - (entropy[one] + entropy[other]) / 2) / torch.log(torch.tensor(2.0))
            shared = has_row[one] & has_row[other]
            sums[one, other] = sums[other, one] = bits.clamp(0, 1).mul(shared).double().sum(-1)
    return sums, both
