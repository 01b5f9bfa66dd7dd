"""Prompts in batches of bounded size, and means over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from interp.model import Model, Site
from interp.tasks import Task

TOKENS_A_BATCH = 1024
"""Prompts are batched up to about this many tokens: on a CPU the matrix products are then near their best rate."""


def rows_a_batch(length: int, batch_size: int | None) -> int:
    """Prompts a forward pass: `batch_size` if given, else about `TOKENS_A_BATCH` tokens' worth of this length."""
    return batch_size or max(1, TOKENS_A_BATCH // length)


def batches(n_prompts: int, length: int, batch_size: int | None) -> Iterator[slice]:
    """Slices of the prompts, each for one forward pass."""
    step = rows_a_batch(length, batch_size)
    return (slice(start, start + step) for start in range(0, n_prompts, step))


def mean_activations(
    model: Model, groups: Sequence[Task], sites: Sequence[Site], *, batch_size: int | None = None
) -> dict[Site, Tensor]:
    """Mean of each site over all prompts and positions of the clean runs, accumulated in float32.

    Args:
        model: the model.
        groups: prompts by length, as `task.by_length()` gives them.
        sites: sites with a batch and a position axis.
        batch_size: prompts a forward pass.

    Returns:
        By site, the activation's shape without batch and position, in the model's dtype.
    """
    totals: dict[Site, Tensor] = {}
    count = 0
    for group in groups:
        for rows in batches(len(group), group.clean.shape[1], batch_size):
            _, cache = model.run_with_cache(group.clean[rows], sites, logits_to_keep=1)
            for site in sites:
                totals[site] = totals.get(site, torch.zeros(())).to(model.device) + cache[site].float().sum((0, 1))
        count += group.clean.numel()
    return {site: (total / count).to(model.dtype) for site, total in totals.items()}
