"""Which keys a head attends to: one pattern with its tokens, and the standard scores on repeated random tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.heads.attention_calls import attention_modules, call_stats, pattern_rows
from interp.heads.rows import Measure, key_positions, row_means
from interp.model import Model
from interp.model.attention import AttentionCall, AttentionResult, attention_wrapped
from interp.model.edit import resolve_columns
from interp.model.inputs import Prompts
from interp.patching.labels import model_provenance

SCORES = ("previous_token", "induction", "duplicate_token", "current_token", "first_token")


@torch.no_grad()
def pattern(
    model: Model,
    prompt: Prompts,
    layers: int | Sequence[int],
    heads: int | Sequence[int],
    *,
    rows: Sequence[int] | None = None,
) -> xr.DataArray:
    """Attention patterns of some heads on one prompt, token strings beside both axes.

    They are recomputed from queries and keys, whatever attention implementation the model runs. Costs one forward pass;
    holds rows x keys numbers a head. `pattern(...).squeeze()` is the matrix of a single head.

    Args:
        model: the model.
        prompt: text, token ids, or a mapping of inputs with `input_ids`: one prompt.
        layers: one layer or several, 0 to n_layers - 1, or negative from the last.
        heads: one query head or several, the same in each layer.
        rows: query positions, negative from the prompt's end; None: all.

    Returns:
        DataArray [layer, head, query, key] with coordinates `query_token` and `key_token`. Rows sum to 1 (to less with
        learned sink logits).

    Raises:
        ValueError: if a layer, head or row is out of range, or several prompts are given.
    """
    chosen = {
        "layer": resolve_columns(layers, model.n_layers, "layer"),
        "head": resolve_columns(heads, model.n_heads, "head"),
    }
    ids = _one_prompt(model, prompt)
    positions = list(range(len(ids))) if rows is None else resolve_columns(rows, len(ids), "row")
    found: dict[int, Tensor] = {}

    def see(call: AttentionCall, *, layer: int) -> AttentionResult:
        result = call.run()
        # Where scores or pattern are edited, what queries and keys say is not what the model used.
        edited = None if call.is_plain else result[1]
        which = torch.tensor(positions)
        part = pattern_rows(call, chosen["head"], which) if edited is None else edited[:, chosen["head"]][:, :, which]
        found[layer] = part[0].float().cpu()
        return result

    modules = attention_modules(model, chosen["layer"])
    with attention_wrapped({module: partial(see, layer=layer) for layer, module in modules.items()}):
        model(ids[None] if isinstance(prompt, str) else prompt, logits_to_keep=1)
    labels = model.to_str_tokens(ids) if model.tokenizer is not None else [str(one) for one in ids.tolist()]
    return xr.DataArray(
        torch.stack([found[layer] for layer in chosen["layer"]]).numpy(),
        dims=("layer", "head", "query", "key"),
        coords={
            **chosen,
            "query": positions,
            "key": range(len(ids)),
            "query_token": ("query", [labels[row] for row in positions]),
            "key_token": ("key", labels),
        },
        name="pattern",
        attrs={**model_provenance(model), "method": "pattern"},
    )


def planted_tokens(
    model: Model, period: int = 50, n_sequences: int = 12, seed: int = 0, bos: int | None = None
) -> Int[Tensor, "sequence pos"]:
    """Random tokens followed by the same tokens again: what induction and duplicate-token heads show themselves on.

    Within a sequence no token repeats inside the period, so that each has exactly one earlier copy. Special tokens are
    left out.

    Args:
        model: tells the vocabulary.
        period: random tokens before they repeat.
        n_sequences: rows.
        seed: of the draw; the global random state is neither used nor changed.
        bos: a token id to put first; None for none, which leaves first-position attention to a random token.

    Returns:
        [n_sequences, 2 * period], one column more with a BOS.

    Raises:
        ValueError: if the vocabulary has fewer ordinary tokens than the period.
    """
    ordinary = _ordinary_tokens(model)
    if len(ordinary) < period:
        raise ValueError(f"a period of {period} needs as many ordinary tokens; this vocabulary has {len(ordinary)}")
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(len(ordinary), generator=generator)[:period] for _ in range(n_sequences)]
    once = ordinary[torch.stack(drawn)]
    first = [] if bos is None else [torch.full((n_sequences, 1), bos)]
    return torch.cat([*first, once, once], dim=1)


def pattern_scores(
    model: Model,
    tokens: Int[Tensor, "sequence pos"] | None = None,
    *,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """How much each head attends to the previous, the repeated, the current and the first token.

    Each score is attention averaged over queries and sequences. With T random tokens that repeat once and o = 1 if a
    BOS stands before them:

    * `previous_token`: A[q, q-1] over q >= 1;
    * `induction`: A[q, q-T+1], what followed the token's earlier copy, over q >= T+o+1 (at q = T+o the token before
      differs from the one before its copy);
    * `duplicate_token`: A[q, q-T], the earlier copy, over q >= T+o;
    * `current_token`: A[q, q] over all q;
    * `first_token`: A[q, 0] over all q (row 0 included, where it is 1).

    Costs one forward pass a sequence, and each layer's scores once more; no pattern is held.

    Args:
        model: the model.
        tokens: repeated random tokens by default (`planted_tokens(model)`). On tokens that do not repeat, `induction`
            and `duplicate_token` are NaN.
        batch_size: sequences a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset [layer, head] by score; each variable's attr `n_rows` says how many rows were averaged.

    Source: induction stripe, Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al.
    2022 (arXiv 2209.11895). Checked against planted patterns and an eager Hugging Face forward in
    tests/heads/test_patterns.py.
    """
    started = time.perf_counter()
    tokens = planted_tokens(model) if tokens is None else tokens
    period, offset = _repetition(tokens)
    means = row_means(model, [(tokens, stripes(period, offset))], batch_size=batch_size, progress=progress)
    attrs: dict[str, Any] = {
        **model_provenance(model),
        "method": "pattern_scores",
        "n_sequences": len(tokens),
        "period": period,
        "offset": offset,
        "seconds": time.perf_counter() - started,
    }
    return xr.Dataset(
        {name: (("layer", "head"), means[name][0].numpy(), {"n_rows": means[name][1]}) for name in SCORES},
        coords={"layer": range(model.n_layers), "head": range(model.n_heads)},
        attrs=attrs,
    )


def stripes(period: int, offset: int) -> Measure:
    """The measure behind `pattern_scores`: the entries of each score's stripe, row by row.

    Args:
        period: tokens before they repeat; 0 if they do not, which leaves induction and duplicate-token without rows.
        offset: tokens before the first period (a BOS).
    """
    offsets = (1, 0, period - 1, period) if period else (1, 0)

    def measure(call: AttentionCall, rows: slice) -> dict[str, Float[Tensor, "batch head row"]]:
        stats = call_stats(call, key_sets=key_positions(call, [0])[None], offsets=offsets)
        previous, current, *repeated = stats.stripes
        induction, duplicate = repeated if period else (current[..., :0], current[..., :0])
        return {
            "previous_token": previous[..., 1:],
            "induction": induction[..., period + offset + 1 :],
            "duplicate_token": duplicate[..., period + offset :],
            "current_token": current,
            "first_token": stats.mass[0],
        }

    return measure


def matching_score(
    pattern: Float[Tensor, "*batch query key"], mask: Bool[Tensor, "*#batch query key"]
) -> Float[Tensor, "*batch"]:
    """Share of attention that falls on a planted pattern, in the rows where that pattern says anything.

    Σ(A∘M) / Σ A over the rows in which M has an entry. Dividing by all rows instead would cap a perfect induction head
    at half on repeated tokens. NaN where M is empty.
    """
    rows = mask.any(-1, keepdim=True)
    attention = pattern.float()
    return (attention * mask).sum((-2, -1)) / (attention * rows).sum((-2, -1))


def _one_prompt(model: Model, prompt: Prompts) -> Int[Tensor, " pos"]:
    """The token ids of a single prompt.

    Raises:
        ValueError: if there are several.
    """
    if isinstance(prompt, str):
        return model.to_tokens(prompt)[0]
    ids = torch.atleast_2d(torch.as_tensor(prompt["input_ids"] if isinstance(prompt, Mapping) else prompt))
    if len(ids) != 1:
        raise ValueError(f"pattern takes one prompt; got {len(ids)}")
    return ids[0]


def _repetition(tokens: Int[Tensor, "sequence pos"]) -> tuple[int, int]:
    """(period, offset) of tokens that repeat once, after at most one BOS; (0, 0) if they do not."""
    period, offset = divmod(tokens.shape[1], 2)
    repeats = period > 1 and torch.equal(tokens[:, offset : offset + period], tokens[:, offset + period :])
    return (period, offset) if repeats else (0, 0)


def _ordinary_tokens(model: Model) -> Int[Tensor, " token"]:
    """Ids that stand for text: no special tokens, none beyond the tokenizer (embeddings are often padded)."""
    special = {getattr(model.hf.config, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk")}
    size = model.d_vocab
    if model.tokenizer is not None:
        special |= set(model.tokenizer.all_special_ids)
        special |= {i for i, token in getattr(model.tokenizer, "added_tokens_decoder", {}).items() if token.special}
        size = min(size, len(model.tokenizer))
    return torch.tensor([token for token in range(size) if token not in special])
