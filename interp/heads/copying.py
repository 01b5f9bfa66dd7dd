"""Does a head copy? From the eigenvalues of its OV circuit, and from what it makes of a token in context."""

from __future__ import annotations

import time

import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.heads.lens import ROWS_AT_ONCE
from interp.heads.rows import token_groups
from interp.heads.weights import by_query_head, check_linear, norm_of, value_weights
from interp.model import Model
from interp.patching.labels import model_provenance
from interp.tasks import Task


def copying_eigenvalues(model: Model) -> xr.DataArray:
    """Σ λ / Σ |λ| over the eigenvalues of each head's full OV circuit W_E W_V W_O W_U.

    1 = tokens raise their own logit (copying), −1 = they lower it (suppression).

    The [d_vocab, d_vocab] matrix has the same non-zero eigenvalues as a [d_head, d_head] product, which is what is
    computed. Many heads score above 0.5, so that alone says little: see `copying_top_k`.

    Returns:
        DataArray [layer, head], the real part.

    Raises:
        UnsupportedModel: for post-norm models and those that embed in another width than they compute in.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". Checked against the dense matrix in
    tests/heads/test_copying.py.
    """
    started = time.perf_counter()
    check_linear(model)
    final = norm_of(model, model.tower.ln_final)
    around = model.W_U.float() @ model.W_E.float()
    scores = []
    for layer in range(model.n_layers):
        W_V, W_O = value_weights(model, layer)
        through = torch.einsum("hdm,mn,hne->hde", final.apply(W_O), around.to(W_O.device), W_V)
        eigenvalues = torch.linalg.eigvals(through.double().cpu())
        scores.append(eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1))
    return xr.DataArray(
        torch.stack(scores).float().numpy(),
        dims=("layer", "head"),
        coords={"layer": range(model.n_layers), "head": range(model.n_heads)},
        name="copying_eigenvalues",
        attrs={
            **model_provenance(model),
            "method": "copying_eigenvalues",
            "seconds": time.perf_counter() - started,
        },
    )


@torch.no_grad()
def copying_top_k(model: Model, prompts: Task | Int[Tensor, "prompt pos"], *, k: int = 5) -> xr.Dataset:
    """Share of tokens that a head, attending to nothing else, puts among the k most likely next tokens.

    What stands in the stream after block 0 at a token goes through the head's OV (its norm, W_V, b_V, W_O), the final
    norm and the unembedding; then the token itself should be in the top k. With the opposite sign of the head's output
    that is `negative`: the head would take the token out. Costs an unembedding a token and head, twice.

    Args:
        model: the model.
        prompts: a task: its answers and wrong answers wherever they stand in the clean prompts (the names, in IOI); or
            token ids: all tokens. Each distinct token counts once, where it first occurs.
        k: how far up the token has to be.

    Returns:
        Dataset [layer, head] of `copying` and `negative`, with the number of tokens in attr `n_tokens`; NaN if there
        are none (a task whose answers do not stand in its prompts).

    Raises:
        UnsupportedModel: for post-norm models and those that embed in another width than they compute in.

    Source: Wang et al. 2022 (arXiv 2211.00593), Section 3.3 ("copy score", k = 5).
    """
    started = time.perf_counter()
    check_linear(model)
    tokens, stream = _tokens_after_block_0(model, prompts)
    shares = torch.full((2, model.n_layers, model.n_heads), torch.nan)
    for layer in range(model.n_layers if len(tokens) else 0):
        written = _written(model, layer, stream)
        in_top = _in_top_k(model, torch.stack([written, -written], dim=1), tokens, k)
        shares[:, layer] = in_top.float().mean(0).cpu()
    return xr.Dataset(
        {name: (("layer", "head"), share.numpy()) for name, share in zip(("copying", "negative"), shares, strict=True)},
        coords={"layer": range(model.n_layers), "head": range(model.n_heads)},
        attrs={
            **model_provenance(model),
            "method": "copying_top_k",
            "k": k,
            "n_tokens": len(tokens),
            "seconds": time.perf_counter() - started,
        },
    )


def _tokens_after_block_0(
    model: Model, prompts: Task | Int[Tensor, "prompt pos"]
) -> tuple[Int[Tensor, " token"], Float[Tensor, "token d_model"]]:
    """Distinct tokens to test, and the stream after block 0 where each first stands."""
    wanted = (
        set(torch.cat([prompts.answers, prompts.wrong], 1).flatten().tolist()) if isinstance(prompts, Task) else None
    )
    found: dict[int, Tensor] = {}
    for group in token_groups(prompts):
        _, cache = model.run_with_cache(group, "blocks.0.hook_resid_post", logits_to_keep=1)
        for row, position in torch.cartesian_prod(*map(torch.arange, group.shape)).tolist():
            token = int(group[row, position])
            if token not in found and (wanted is None or token in wanted):
                found[token] = cache["resid_post", 0][row, position]
    stream = torch.stack(list(found.values())) if found else torch.zeros(0, model.d_model)
    return torch.tensor(list(found), dtype=torch.long, device=stream.device), stream


def _written(model: Model, layer: int, stream: Float[Tensor, "token d_model"]) -> Float[Tensor, "token head d_model"]:
    """What each head of a layer writes if it attends to that stream alone; without b_O."""
    block = model.tower.blocks[layer]
    normed = stream if block.ln1 is None else block.ln1(stream)
    b_V = model.weights.of_block("b_V", layer).repeat_interleave(model.n_heads // model.n_kv_heads, dim=0)
    W_O = model.weights.of_block("W_O", layer)
    value = torch.einsum("tm,hmd->thd", normed, by_query_head(model, "W_V", layer).to(normed.dtype)) + b_V
    out = torch.einsum("thd,hdm->thm", value, W_O)
    return out if block.attn_post is None else block.attn_post(out)


def _in_top_k(
    model: Model, written: Float[Tensor, "token ... d_model"], tokens: Int[Tensor, " token"], k: int
) -> Bool[Tensor, "token ..."]:
    """Whether each token is among the k most likely after each of the vectors written for it."""
    rows = written.flatten(0, -2)
    own = tokens.repeat_interleave(len(rows) // len(tokens))
    found = []
    for vectors, token in zip(rows.split(ROWS_AT_ONCE), own.split(ROWS_AT_ONCE), strict=True):
        logits = model.unembed(model.final_norm(vectors)).float()
        found.append((logits >= logits.gather(-1, token[:, None])).sum(-1) <= k)  # ties count against the token
    return torch.cat(found).reshape(written.shape[:-1])
