"""Prompt pairs of the zoo's models, made of token ids; `as_task` turns them into a `Task`."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from interp.tasks import Task
from interp.zoo.words import BOS


@dataclass(frozen=True)
class Prompt:
    """A clean prompt, its corrupted twin and the answers that tell them apart."""

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    answer: int
    wrong: int
    positions: Mapping[str, int]


Draw = Callable[[random.Random, int], Prompt]


@dataclass(frozen=True)
class Behaviour:
    """How the prompts of a task are drawn, and what the task says of itself."""

    name: str
    words: tuple[str, ...]
    """Word i is token i."""
    draw: Draw
    """Makes the prompt of this number; what numbers are for is the behaviour's."""
    description: str
    corruption: str

    def as_task(self, n: int, seed: int) -> Task:
        """A task of n prompt pairs, drawn independently of each other.

        Raises:
            ValueError: for less than one prompt.
        """
        if n < 1:
            raise ValueError(f"n={n}; a task has at least one prompt pair")
        rng = random.Random(seed)
        prompts = [self.draw(rng, number) for number in range(n)]
        clean = tuple(self._labels(prompt.clean) for prompt in prompts)
        corrupted = tuple(self._labels(prompt.corrupted) for prompt in prompts)
        return Task(
            name=self.name,
            clean_ids=tuple(prompt.clean for prompt in prompts),
            corrupted_ids=tuple(prompt.corrupted for prompt in prompts),
            answers=torch.tensor([[prompt.answer] for prompt in prompts]),
            wrong=torch.tensor([[prompt.wrong] for prompt in prompts]),
            positions={
                name: torch.tensor([prompt.positions[name] for prompt in prompts]) for name in prompts[0].positions
            },
            metric="logit_diff",
            clean_text=tuple(" ".join(labels[1:]) for labels in clean),
            corrupted_text=tuple(" ".join(labels[1:]) for labels in corrupted),
            str_tokens=clean,
            corrupted_str_tokens=corrupted,
            index=torch.arange(n),
            description=self.description,
            corruption=self.corruption,
            seed=seed,
        )

    def _labels(self, ids: Sequence[int]) -> tuple[str, ...]:
        return tuple(self.words[token] for token in ids)


def repeated_sequence(n_words: int, *, length: int, repeated: int, successor: bool = False) -> Draw:
    """Draws sequences of distinct tokens that begin anew: "x A B y C D z x A", answer B.

    The corrupted prompt answers D instead, for one of three reasons, in turn: it ends in C; C stands before B, and A
    before D; D follows A, and B follows C. Each is another way into the induction head: its query, key or value.

    Args:
        n_words: size of the vocabulary; token 0 is the BOS.
        length: tokens before the repetition.
        repeated: tokens of the repetition.
        successor: answer with the next token of the vocabulary (cyclic, without BOS) in place of B.
    """
    if not 1 <= repeated <= length - 4:
        raise ValueError(f"repeated={repeated}; 1..{length - 4} of {length} tokens leave room for a second pair")
    if length >= n_words:
        raise ValueError(f"length={length}; a vocabulary of {n_words} has {n_words - 1} distinct tokens")

    def draw(rng: random.Random, number: int) -> Prompt:
        sequence = rng.sample(range(1, n_words), length)
        a, c = repeated - 1, rng.randrange(repeated + 1, length - 1)
        changed, last = list(sequence), sequence[a]
        match number % 3:
            case 0:
                last = sequence[c]
            case 1:
                changed[a], changed[c] = sequence[c], sequence[a]
            case _:
                changed[a + 1], changed[c + 1] = sequence[c + 1], sequence[a + 1]
        right, wrong = sequence[a + 1], sequence[c + 1]
        if successor:
            right, wrong = (token % (n_words - 1) + 1 for token in (right, wrong))
        return Prompt(
            clean=(BOS, *sequence, *sequence[:repeated]),
            corrupted=(BOS, *changed, *sequence[: repeated - 1], last),
            answer=right,
            wrong=wrong,
            positions={"A": a + 1, "B": a + 2, "C": c + 1, "D": c + 2, "END": length + repeated},
        )

    return draw
