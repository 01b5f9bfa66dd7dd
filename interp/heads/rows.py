"""Means over attention rows, one layer and one batch of prompts at a time.

All that is ever held is the pattern of one layer for one batch: [batch, head, query, key].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.model import Model, Site
from interp.model.hooks import Run, Tap, tapped
from interp.patching.batching import batches
from interp.patching.progress import progress_bar
from interp.tasks import Task

Pattern = Float[Tensor, "batch head query key"]
Allowed = Bool[Tensor, "batch head query key"]

Measure = Callable[[Pattern, Allowed, slice], dict[str, Float[Tensor, "batch head row"]]]
"""From a pattern, the keys that each query may attend to, and which prompts of the group these are, to one value a row
by name. Rows in which a value is undefined are NaN or left out."""


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

    def add(layer: int, values: dict[str, Tensor]) -> None:
        for name, by_row in values.items():
            defined = ~by_row.isnan()
            for totals, amount in ((sums, by_row.double().nan_to_num(0)), (counts, defined.double())):
                blank = [torch.zeros(model.n_heads, dtype=torch.float64) for _ in range(model.n_layers)]
                totals.setdefault(name, blank)[layer] += amount.sum((0, 2)).cpu()

    total = sum(len(tokens) for tokens, _ in groups)
    with progress_bar(total, "reading attention", "prompt", progress=progress) as bar:
        for tokens, measure in groups:
            for rows in batches(len(tokens), tokens.shape[1], batch_size):
                with tapped(model.anatomy, list(_pattern_taps(model, measure, rows, add))):
                    model.last_logits(tokens[rows])
                bar.update(len(tokens[rows]))
    return {
        name: ((torch.stack(sums[name]) / torch.stack(counts[name])).float(), int(torch.stack(counts[name]).min()))
        for name in sums
    }


def token_groups(prompts: Task | Int[Tensor, "prompt pos"]) -> list[Int[Tensor, "_ _"]]:
    """Token ids of equal length: the clean prompts of a task by length, or the tensor itself."""
    return [group.clean for group in prompts.by_length()] if isinstance(prompts, Task) else [prompts]


def _pattern_taps(
    model: Model, measure: Measure, rows: slice, add: Callable[[int, dict[str, Tensor]], None]
) -> Iterator[Tap]:
    """Taps that measure the pattern of each layer as it is computed; scores come before it and say what is masked."""
    for layer in range(model.n_layers):
        allowed: dict[str, Tensor] = {}

        def see_scores(scores: Tensor, run: Run, allowed: dict[str, Tensor] = allowed) -> None:
            allowed["keys"] = ~torch.isneginf(scores)

        def see_pattern(pattern: Tensor, run: Run, layer: int = layer, allowed: dict[str, Tensor] = allowed) -> None:
            add(layer, measure(pattern.float(), allowed.pop("keys"), rows))

        yield Tap(Site("attn_scores", layer), see_scores)
        yield Tap(Site("pattern", layer), see_pattern)
