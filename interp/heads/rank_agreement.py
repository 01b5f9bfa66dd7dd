"""How far two scorings agree on what comes first: Kendall's τ over the top, and with weights that fall with rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

Scores = xr.DataArray | NDArray[np.number] | Sequence[float] | Sequence[int]


def topk_kendall(x: Scores, y: Scores, k: int, *, p: float = 0.5) -> float:
    """Kendall's τ between the tops of two scorings, with ties: 1 = the same order, −1 = the opposite.

    The top of a scoring are the entries with one of its k largest distinct values; all below count as tied. Compared
    are the pairs of entries in either top, except pairs that stand both below one of them, of whose order that scoring
    says nothing. A pair in opposite order is a miss, a pair tied in one scoring alone p of one: τ = 1 − 2 misses /
    pairs.

    Args:
        x: one score an entry, larger = higher; entries that are NaN in either scoring are left out.
        y: the other scoring, of the same shape.
        k: how many distinct values make the top, 1 or more.
        p: what a tie in one scoring counts; 0.5 makes it neutral, neither agreement nor disagreement.

    Returns:
        NaN where no pair can be compared.

    Raises:
        ValueError: for different shapes, k below 1, or p outside 0..1.

    Source: Fagin et al. 2004, "Comparing and Aggregating Rankings with Ties", as used by Neely et al. 2021, "Order in
    the Court" (arXiv 2105.03287). Checked against cases worked out by hand in tests/heads/test_rank_agreement.py.
    """
    if k < 1:
        raise ValueError(f"k={k}; the top has at least 1 value")
    if not 0 <= p <= 1:
        raise ValueError(f"p={p}; what a tie counts lies between 0 and 1")
    ranks = [_top_ranks(values, k) for values in _paired(x, y)]
    in_either = (ranks[0] < k) | (ranks[1] < k)
    order, is_below = [], []
    one, other = np.triu_indices(int(in_either.sum()), 1)
    for rank in ranks:
        top = rank[in_either]
        order.append(np.sign(top[one] - top[other]))
        is_below.append((top[one] == k) & (top[other] == k))
    compared = ~(is_below[0] | is_below[1])
    if not compared.any():
        return float("nan")
    opposite = order[0] * order[1] < 0
    tied_once = (order[0] == 0) != (order[1] == 0)
    misses = opposite[compared].sum() + p * tied_once[compared].sum()
    return float(1 - 2 * misses / compared.sum())


def weighted_kendall(x: Scores, y: Scores, *, power: float = 1.0) -> float:
    """Kendall's τ in which exchanges near the top weigh most: entry r from the top has the weight 1 / (r + 1)^power.

    Args:
        x: one score an entry, larger = higher; entries that are NaN in either scoring are left out.
        y: the other scoring, of the same shape.
        power: 0 weighs all pairs alike, which is Kendall's τ-b.

    Returns:
        The mean of the value under the ranks of x and that under the ranks of y; NaN where a scoring is constant.

    Raises:
        ValueError: for different shapes.

    Source: Vigna 2015, "A Weighted Correlation Index for Rankings with Ties", as scipy computes it.
    """
    one, other = _paired(x, y)
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(stats.weightedtau(one, other, weigher=lambda rank: 1 / (rank + 1) ** power).statistic)


def _paired(x: Scores, y: Scores) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    one, other = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if one.shape != other.shape:
        raise ValueError(f"the scorings have the shapes {one.shape} and {other.shape}; give both the same entries")
    shared = ~(np.isnan(one) | np.isnan(other))
    return one[shared], other[shared]


def _top_ranks(values: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Rank of each entry among the distinct values, 0 = largest; k for all below the top."""
    return np.minimum(stats.rankdata(-values, method="dense") - 1, k)
