"""How the built-in tasks turn a stream of seeded candidates into n aligned prompt pairs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from interp.tasks.pairs import Pair, TokenPair, assemble, tokenise
from interp.tasks.task import Task

if TYPE_CHECKING:
    from interp.model import Model


def collect(
    model: Model,
    draw: Callable[[random.Random], Pair],
    *,
    n: int,
    seed: int,
    one_length: bool,
    name: str,
    metric: str,
    description: str,
    corruption: str,
    aligned: Sequence[str] | None = None,
) -> Task:
    """Draw candidate pairs until n different ones are found.

    With `one_length`, candidates are grouped by token length and by where their key positions stand (in any order, so
    that mirrored templates share a group), and the first group to hold n is the task: position axes then mean the same
    in every prompt.

    Args:
        model: whose tokenizer is used.
        draw: makes one candidate from a random generator of its own; the global random state plays no part.
        n: how many prompt pairs.
        seed: the same seed gives the same task.
        one_length: keep to one length and alignment, or take every candidate.
        name: the task's name.
        metric: the task's metric.
        description: the behaviour in a sentence.
        corruption: how the corrupted prompts are made.
        aligned: the key positions by which candidates are grouped; all by default. A position that says which of
            several answers is right must be left out, or all prompts of the task would have the same one.

    Raises:
        ValueError: if there are not n different prompts to be found; the message says how many there are.
    """
    if n < 1:
        raise ValueError(f"n is {n}; a task needs at least one prompt")
    generator = random.Random(f"{name} {seed}")
    groups: dict[tuple[int, ...], dict[str, TokenPair]] = {}
    for _ in range(1000 + 60 * n):
        pair = draw(generator)
        if any(pair.clean in group for group in groups.values()):
            continue
        tokens = tokenise(model, pair)
        where = sorted(tokens.positions[mark] for mark in (tokens.positions if aligned is None else aligned))
        alignment = (len(tokens.clean), *where) if one_length else ()
        group = groups.setdefault(alignment, {})
        group[pair.clean] = tokens
        if len(group) == n:
            return assemble(
                list(group.values()),
                name=name,
                metric=metric,
                description=description,
                corruption=corruption,
                seed=seed,
            )
    most = max(map(len, groups.values()), default=0)
    advice = "ask for fewer, or pass one_length=False" if one_length and len(groups) > 1 else "ask for fewer"
    raise ValueError(f"{name}: found {most} different prompts, {n} needed; {advice}")
