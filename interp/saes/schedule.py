"""Learning rate and sparsity penalty as functions of the step alone, so that resuming is exact."""

from __future__ import annotations

from collections.abc import Sequence

AFTER_RESAMPLING = 0.1
"""Share of the learning rate from which it rises again after dead features were resampled."""


def learning_rate_factor(step: int, n_steps: int, *, warm_up: int, decay: int, resampled: Sequence[int] = ()) -> float:
    """Share of the full learning rate at a step (from 0): linear warm-up, plateau, linear decay to 0 at the end.

    After each step in `resampled` it drops to a tenth and rises as it did at the start.
    """
    factor = min(1.0, (step + 1) / warm_up) if warm_up else 1.0
    last = max((one for one in resampled if one <= step), default=None)
    if last is not None and warm_up:
        factor = min(factor, AFTER_RESAMPLING + (1 - AFTER_RESAMPLING) * (step - last) / warm_up)
    return min(factor, (n_steps - step) / decay) if decay else factor


def sparsity_factor(step: int, warm_up: int) -> float:
    """Share of the sparsity coefficient at a step: linear warm-up."""
    return min(1.0, (step + 1) / warm_up) if warm_up else 1.0


def resampling_steps(n_steps: int, *, every: int | None, times: int, decay: int) -> list[int]:
    """Steps before which dead features are resampled; none in the final decay."""
    if not every:
        return []
    return list(range(every, n_steps - decay, every))[:times]
