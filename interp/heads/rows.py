"""Means over attention rows, one layer and one batch of prompts at a time; no pattern is held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.heads.attention_calls import attention_modules
from interp.model import Model
from interp.model.attention import AttentionCall, AttentionResult, attention_wrapped
from interp.patching.batching import batches
from interp.patching.progress import progress_bar
from interp.tasks import Task

Measure = Callable[[AttentionCall, slice], dict[str, Float[Tensor, "batch head row"]]]
"""From one call of a layer's attention, and which prompts of the group these are, to one value a row by name. Rows in
which a value is undefined are NaN or left out."""


@torch.no_grad()
def row_means(
    model: Model,
    groups: Sequence[tuple[Int[Tensor, "_ _"], Measure]],
    *,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> dict[str, tuple[Float[Tensor, "layer head"], int]]:
    """Mean of each measure over all rows of all prompts, and how many rows went into it.

    Costs one forward pass a prompt.

    Args:
        model: the model.
        groups: prompts of one length, [prompt, pos], each with what to measure on them; all measures return the same
            names.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        By name: (mean, NaN where no row defines it; rows averaged, of the head that has fewest).

    Raises:
        SiteUnavailable: if the attention of this family cannot be read.
    """
    sums: dict[str, list[Tensor]] = {}
    counts: dict[str, list[Tensor]] = {}

    def see(call: AttentionCall, *, layer: int, measure: Measure, rows: slice) -> AttentionResult:
        for name, by_row in measure(call, rows).items():
            defined = ~by_row.isnan()
            for totals, amount in ((sums, by_row.double().nan_to_num(0)), (counts, defined.double())):
                blank = [torch.zeros(model.n_heads, dtype=torch.float64) for _ in range(model.n_layers)]
                totals.setdefault(name, blank)[layer] += amount.sum((0, 2)).cpu()
        return call.run()

    modules = attention_modules(model, range(model.n_layers))
    total = sum(len(tokens) for tokens, _ in groups)
    with progress_bar(total, "reading attention", "prompt", progress=progress) as bar:
        for tokens, measure in groups:
            for rows in batches(len(tokens), tokens.shape[1], batch_size):
                seen = {
                    module: partial(see, layer=layer, measure=measure, rows=rows) for layer, module in modules.items()
                }
                with attention_wrapped(seen):
                    model.last_logits(tokens[rows])
                bar.update(len(tokens[rows]))
    return {
        name: ((torch.stack(sums[name]) / torch.stack(counts[name])).float(), int(torch.stack(counts[name]).min()))
        for name in sums
    }


def token_groups(prompts: Task | Int[Tensor, "prompt pos"]) -> list[Int[Tensor, "_ _"]]:
    """Token ids of equal length: the clean prompts of a task by length, or the tensor itself."""
    return [group.clean for group in prompts.by_length()] if isinstance(prompts, Task) else [prompts]


def key_positions(call: AttentionCall, positions: Sequence[int]) -> Tensor:
    """The same positions in every prompt of a call as a set of keys, Bool [batch, key]."""
    chosen = torch.zeros(len(call.key), call.key.shape[2], dtype=torch.bool, device=call.key.device)
    chosen[:, list(positions)] = True
    return chosen
