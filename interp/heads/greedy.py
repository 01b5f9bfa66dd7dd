"""Choosing a set of heads (or of anything else) one after another, each time what serves an objective best."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
import pandas as pd

from interp.patching.progress import progress_bar

Candidate = TypeVar("Candidate", bound=Hashable)


def greedy_selection(
    objective: Callable[[Sequence[tuple[Candidate, ...]]], Sequence[float]],
    candidates: Sequence[Candidate],
    k: int,
    *,
    add_per_round: int = 1,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Choose k candidates greedily: each round adds what raises the objective most beside what is chosen already.

    Not the best set in general: where two candidates serve only together, neither is found. For an objective whose
    gains only shrink as the set grows (submodular, non-decreasing, 0 for nothing), it reaches 63 % of the best.

    Costs about k / add_per_round rounds, each of which asks for the objective of one set a remaining candidate, and of
    one more if several are added at once.

    Args:
        objective: from the sets of a round, each a tuple in the order of choice, to one value each, larger = better. It
            sees a whole round at once, so that it can batch.
        candidates: what to choose from, such as (layer, head) pairs. Of equal scores, the earlier candidate is taken.
        k: how many to choose.
        add_per_round: how many to add a round by the scores of each beside the set before; more is faster and blind to
            what they do together.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        A row a choice, in order: `candidate`; `round`; `score`, the objective of the set before the round with this
        candidate alone; `objective`, that of the set after the round.

    Raises:
        ValueError: for candidates that repeat, k or add_per_round out of range, or an objective that returns another
            number of values.
        FloatingPointError: if the objective is NaN for a set.

    Source: the selection loop of HeadHunter (arXiv 2506.10978). Checked against exhaustive search in
    tests/heads/test_greedy.py.
    """
    if len(set(candidates)) != len(candidates):
        raise ValueError(f"the {len(candidates)} candidates repeat: {len(set(candidates))} are different")
    if not 1 <= k <= len(candidates):
        raise ValueError(f"k={k}; with {len(candidates)} candidates it is 1 to {len(candidates)}")
    if add_per_round < 1:
        raise ValueError(f"add_per_round={add_per_round}; it is at least 1")
    chosen: tuple[Candidate, ...] = ()
    records: list[dict[str, object]] = []
    n_round = 0
    with progress_bar(k, "greedy selection", "choice", progress=progress) as bar:
        while len(chosen) < k:
            remaining = [one for one in candidates if one not in chosen]
            scores = _values(objective, [(*chosen, one) for one in remaining])
            best = np.argsort(-scores, kind="stable")[: min(add_per_round, k - len(chosen))]
            chosen = (*chosen, *(remaining[one] for one in best))
            value = scores[best[0]] if len(best) == 1 else _values(objective, [chosen])[0]
            n_round += 1
            records += [
                {"candidate": remaining[one], "round": n_round, "score": scores[one], "objective": value}
                for one in best
            ]
            bar.update(len(best))
    return pd.DataFrame.from_records(records)


def _values(
    objective: Callable[[Sequence[tuple[Candidate, ...]]], Sequence[float]], sets: Sequence[tuple[Candidate, ...]]
) -> np.ndarray:
    values = np.asarray([float(value) for value in objective(sets)])
    if len(values) != len(sets):
        raise ValueError(f"the objective was given {len(sets)} sets and returned {len(values)} values")
    if np.isnan(values).any():
        raise FloatingPointError(f"the objective is NaN for {sets[int(np.isnan(values).argmax())]}")
    return values
