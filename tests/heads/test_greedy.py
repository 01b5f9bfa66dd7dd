from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from interp import heads

COVERS = {
    (0, 0): {1, 2, 3, 4},
    (0, 1): {3, 4, 5},
    (1, 0): {5, 6},
    (1, 1): {1, 2, 5},
    (2, 0): {7},
    (2, 1): set(),
}
CANDIDATES = list(COVERS)


def covered(sets):
    return [len(set().union(*(COVERS[one] for one in chosen))) for chosen in sets]


def test_each_round_takes_what_exhaustive_search_takes():
    found = heads.greedy_selection(covered, CANDIDATES, 4)
    chosen = []
    for row in found.itertuples():
        remaining = [one for one in CANDIDATES if one not in chosen]
        best = max(remaining, key=lambda one: covered([(*chosen, one)])[0])
        assert row.candidate == best
        chosen.append(best)
        assert row.objective == row.score == covered([chosen])[0]
    assert chosen == [(0, 0), (1, 0), (2, 0), (0, 1)]
    assert list(found["round"]) == [1, 2, 3, 4]
    assert list(found.columns) == ["candidate", "round", "score", "objective"]


@pytest.mark.parametrize("k", range(1, 6))
def test_the_set_covers_at_least_63_percent_of_the_best_one(k):
    best = max(covered(list(combinations(CANDIDATES, k))))
    assert heads.greedy_selection(covered, CANDIDATES, k)["objective"].iloc[-1] >= (1 - 1 / np.e) * best


def test_additive_gains_are_chosen_in_their_order_whatever_is_added_a_round():
    gains = np.random.default_rng(0).normal(size=7)

    def total(sets):
        return [gains[list(chosen)].sum() for chosen in sets]

    for add_per_round, rounds in ((1, [1, 2, 3, 4, 5]), (2, [1, 1, 2, 2, 3]), (9, [1] * 5)):
        found = heads.greedy_selection(total, range(7), 5, add_per_round=add_per_round)
        assert list(found["candidate"]) == list(np.argsort(-gains)[:5])
        assert list(found["round"]) == rounds
        assert found["objective"].iloc[0] == pytest.approx(np.sort(gains)[::-1][: rounds.count(1)].sum())
        assert found["objective"].iloc[-1] == pytest.approx(np.sort(gains)[::-1][:5].sum())
        assert found["score"].iloc[0] == pytest.approx(gains.max())


def test_a_round_is_asked_for_in_one_call():
    asked = []

    def objective(sets):
        asked.append(list(sets))
        return covered(sets)

    heads.greedy_selection(objective, CANDIDATES, 3, add_per_round=2)
    assert [len(sets) for sets in asked] == [6, 1, 4]
    assert asked[1] == [((0, 0), (0, 1))]
    assert asked[2][0] == ((0, 0), (0, 1), (1, 0))


@pytest.mark.parametrize(
    ("candidates", "k", "options", "message"),
    [
        ([1, 1], 1, {}, "the 2 candidates repeat: 1 are different"),
        ([1, 2], 3, {}, "k=3; with 2 candidates it is 1 to 2"),
        ([1, 2], 0, {}, "k=0"),
        ([1, 2], 1, {"add_per_round": 0}, "add_per_round=0; it is at least 1"),
    ],
)
def test_bad_numbers_are_refused_before_the_objective_is_asked(candidates, k, options, message):
    with pytest.raises(ValueError, match=message):
        heads.greedy_selection(lambda sets: pytest.fail("asked"), candidates, k, **options)


def test_an_objective_must_answer_every_set_with_a_number():
    with pytest.raises(ValueError, match="was given 3 sets and returned 1 values"):
        heads.greedy_selection(lambda sets: [1.0], [1, 2, 3], 1)
    with pytest.raises(FloatingPointError, match=r"the objective is NaN for \(2,\)"):
        heads.greedy_selection(lambda sets: [0.0 if one == (1,) else np.nan for one in sets], [1, 2, 3], 1)
