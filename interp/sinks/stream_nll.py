"""What a streamed cache costs: the loss token by token with the whole text, with a window, and with sinks and window.

The dense run is one pass over the text. The streamed ones go through it token by token, all prompts and all caches of
one size as the rows of one batch: a row keeps its own number of sinks and counts positions in its own way.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from interp.model import Model
from interp.patching.batching import batches
from interp.patching.labels import model_provenance
from interp.patching.progress import progress_bar
from interp.sinks.rotary import check_rotary
from interp.sinks.sink_window import SinkWindow
from interp.sinks.streaming import streamed_rows

ROWS_A_BATCH = 32
"""Prompts times caches a streamed pass, unless told otherwise."""


def sink_windows(size: int) -> list[SinkWindow]:
    """Caches of one size to compare: no sink, one, two and four, and the extremes with the text's own positions."""
    if size < 5:
        raise ValueError(f"a cache with four sinks and a window has 5 tokens or more; got {size}")
    in_cache = [SinkWindow(sinks, size - sinks) for sinks in (0, 1, 2, 4)]
    return in_cache + [SinkWindow(sinks, size - sinks, "original") for sinks in (0, 4)]


@torch.no_grad()
def stream_nll(
    model: Model,
    tokens: Int[Tensor, "prompt pos"],
    variants: Sequence[SinkWindow],
    *,
    chunk: int = 1,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Negative log-likelihood of every token, dense and with each streamed cache.

    Costs one dense forward pass a prompt, and one streamed pass for every `chunk` tokens of a batch.

    Args:
        model: the model.
        tokens: texts of one length, without padding.
        variants: caches to compare, for instance `sink_windows(64)`.
        chunk: tokens a streamed pass; inside one, a token sees up to `chunk` - 1 keys more than it would by itself.
        batch_size: prompts a pass; by default about a thousand tokens of the dense run, and 32 rows of a streamed one.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        [variant, prompt, position], in nats, float32; the first variant is "dense", the others are called after their
        caches (`4+60`, `4+60 original`). Position p holds the loss of token p given those before it, from 1 on.

    Raises:
        UnsupportedModel: if this family has no rotary position embeddings.
        ValueError: if there is nothing to predict, two variants are the same, or a chunk exceeds a window.
    """
    _check(model, tokens, variants, chunk)
    started = time.perf_counter()
    tokens = tokens.to(model.device)
    n_prompts, length = tokens.shape
    groups = _by_size(variants)
    a_batch = [batch_size or max(1, ROWS_A_BATCH // len(group)) for group in groups]
    steps = len(range(0, length - 1, chunk))
    total = n_prompts + sum(steps * len(range(0, n_prompts, rows)) for rows in a_batch)
    losses = torch.full((1 + len(variants), n_prompts, length - 1), float("nan"))
    with progress_bar(total, "streamed loss", "pass", progress=progress) as bar:
        for rows in batches(n_prompts, length, batch_size):
            losses[0, rows] = _losses(model(tokens[rows])[:, :-1], tokens[rows, 1:]).cpu()
            bar.update(len(tokens[rows]))
        for group, size in zip(groups, a_batch, strict=True):
            for rows in batches(n_prompts, length, size):
                streamed = _streamed(model, tokens[rows], [variants[index] for index in group], chunk, bar)
                losses[torch.tensor(group) + 1, rows] = streamed.cpu()
    return xr.DataArray(
        losses.numpy(),
        dims=("variant", "prompt", "position"),
        coords={
            "variant": ["dense", *(one.name for one in variants)],
            "prompt": range(n_prompts),
            "position": range(1, length),
        },
        name="nll",
        attrs={
            **model_provenance(model),
            "method": "stream_nll",
            "chunk": chunk,
            "seconds": time.perf_counter() - started,
        },
    )


def stream_perplexity(nll: xr.DataArray, *, first: int = 1) -> xr.DataArray:
    """Perplexity of each variant over all prompts: exp of the mean loss of the tokens from position `first` on.

    Args:
        nll: as `stream_nll` returns it.
        first: positions before it are left out: until the cache is full, all variants are the dense run.

    Raises:
        ValueError: if no position is left.
    """
    kept = nll.sel(position=slice(first, None))
    if kept.sizes["position"] == 0:
        raise ValueError(f"no position from {first} on: the last one is {int(nll['position'][-1])}")
    mean = kept.mean(("prompt", "position"), dtype=np.float64)
    return mean.copy(data=np.exp(mean.values)).rename("perplexity").assign_attrs(nll.attrs, first=first)


def _check(model: Model, tokens: Tensor, variants: Sequence[SinkWindow], chunk: int) -> None:
    check_rotary(model.tower)
    names = [one.name for one in variants]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"give one cache or more, each once; got {names}")
    if tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise ValueError(f"there is nothing to predict: the tokens have shape {tuple(tokens.shape)}")
    if bool(model.images.mask(tokens).any()):
        raise ValueError("the prompts have images, whose pieces are no words to predict; give prompts of text alone")
    smallest = min(one.recent for one in variants)
    if not 1 <= chunk <= smallest:
        raise ValueError(f"chunk is 1 to {smallest}, the shortest window; got {chunk}")


def _by_size(variants: Sequence[SinkWindow]) -> list[list[int]]:
    """Indices of the variants whose caches have the same size: rows of one batch are as long as the longest of them."""
    sizes = dict.fromkeys(one.size for one in variants)
    return [[index for index, one in enumerate(variants) if one.size == size] for size in sizes]


def _streamed(
    model: Model, tokens: Int[Tensor, "prompt pos"], windows: Sequence[SinkWindow], chunk: int, bar: tqdm
) -> Float[Tensor, "variant prompt predicted"]:
    """One pass for every chunk; the rows are windows x prompts."""
    rows = tokens.repeat(len(windows), 1)
    cache = DynamicCache()
    found = []
    with streamed_rows(model, [window for window in windows for _ in tokens]):
        for inputs, targets in zip(rows[:, :-1].split(chunk, dim=1), rows[:, 1:].split(chunk, dim=1), strict=True):
            output = model.hf(input_ids=inputs, past_key_values=cache, use_cache=True)
            found.append(_losses(output.logits, targets))
            bar.update()
    return torch.cat(found, dim=1).unflatten(0, (len(windows), len(tokens)))


def _losses(logits: Float[Tensor, "row pos vocab"], targets: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos"]:
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none")
