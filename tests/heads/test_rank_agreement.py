from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from interp import heads

X, Y = [1, 2, 3, 1, 1, 2, 2], [3, 2, 1, 2, 1, 2, 1]


@pytest.mark.parametrize(
    ("k", "misses", "pairs"),
    [
        (7, 8 + 10 / 2, 21),
        (3, 8 + 10 / 2, 21),
        (2, 8 + 4 / 2, 13),  # entries {1, 2, 5, 6} and {0, 1, 3, 5}; of 15 pairs, (0, 3) and (2, 6) say nothing
        (1, 1, 1),
    ],
)
def test_topk_kendall_of_cases_worked_out_by_hand(k, misses, pairs):
    assert heads.topk_kendall(X, Y, k) == pytest.approx(1 - 2 * misses / pairs)


def test_the_published_values():
    found = [round(heads.topk_kendall(X, Y, k), 4) for k in (3, 2, 1)]
    assert found == [-0.2381, -0.5385, -1.0]
    # Buckets of different sizes, a tie counting as a miss: 10 misses and 9 ties of 21 pairs, 10 and 6 of 17.
    other = [1, 2, 3, 1, 2, 2, 2]
    assert heads.topk_kendall(other, Y, 3, p=1.0) == pytest.approx(1 - 2 * 19 / 21)
    assert heads.topk_kendall(other, Y, 2, p=1.0) == pytest.approx(1 - 2 * 16 / 17)


@pytest.mark.parametrize("k", range(1, 8))
def test_the_same_and_the_opposite_order(k):
    order = list(range(7))
    assert heads.topk_kendall(order, order, k) == (1 if k > 1 else pytest.approx(np.nan, nan_ok=True))
    assert heads.topk_kendall(order, order[::-1], k) == -1


def test_all_of_two_orders_without_ties_is_kendalls_tau():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 4, 10))
    assert heads.topk_kendall(x, y, 40) == pytest.approx(stats.kendalltau(x, y).statistic)


def test_entries_below_both_tops_play_no_part_and_nan_is_left_out():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 20))
    low = [-90.0, -80.0, -70.0]
    expected = heads.topk_kendall(x, y, 5)
    assert heads.topk_kendall([*x, *low], [*y, *low[::-1]], 5) == expected
    assert heads.topk_kendall([*x, np.nan, 99], [*y, 99, np.nan], 5) == expected


def test_weighted_kendall_without_weights_is_tau_b_and_with_them_is_a_weighted_count():
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 6, (2, 30)).astype(float)
    assert heads.weighted_kendall(x, y, power=0.0) == pytest.approx(stats.kendalltau(x, y).statistic)
    x, y = rng.normal(size=(2, 9))
    for power in (1.0, 2.0):
        under = []
        for ranking in (x, y):
            weight = 1 / stats.rankdata(-ranking) ** power
            pairs = [(i, j) for i in range(9) for j in range(i)]
            total = sum(weight[i] + weight[j] for i, j in pairs)
            signed = sum((weight[i] + weight[j]) * np.sign((x[i] - x[j]) * (y[i] - y[j])) for i, j in pairs)
            under.append(signed / total)
        assert heads.weighted_kendall(x, y, power=power) == pytest.approx(np.mean(under))


def test_an_exchange_at_the_top_costs_more_than_one_at_the_bottom():
    order = np.arange(10.0)
    top, bottom = order.copy(), order.copy()
    top[[9, 8]], bottom[[0, 1]] = [8, 9], [1, 0]
    assert heads.weighted_kendall(order, top) < heads.weighted_kendall(order, bottom) < 1


def test_undefined_is_nan_and_bad_arguments_are_refused():
    assert np.isnan(heads.topk_kendall([1.0], [2.0], 1))
    assert np.isnan(heads.weighted_kendall([1.0, 1.0], [2.0, 3.0]))
    assert np.isnan(heads.weighted_kendall([2.0, 3.0], [1.0, 1.0]))
    assert np.isnan(heads.weighted_kendall([np.nan, 1.0], [2.0, 3.0]))
    with pytest.raises(ValueError, match=r"have the shapes \(2,\) and \(3,\)"):
        heads.topk_kendall([1, 2], [1, 2, 3], 1)
    with pytest.raises(ValueError, match="k=0; the top has at least 1 value"):
        heads.topk_kendall(X, Y, 0)
    with pytest.raises(ValueError, match=r"p=1\.5"):
        heads.topk_kendall(X, Y, 2, p=1.5)
