"""A task with one set of possible answers, for tests of multiple choice."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.patching.tokens_task import task_of_tokens

LETTERS = (3, 5, 7, 9)
N_PROMPTS, LENGTH = 6, 7


def choice_task(model, n=N_PROMPTS, seed=0):
    """Random prompts, each with another of the four letters as its answer."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(10, model.d_vocab, (n, LENGTH), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 2] = 10 + (corrupted[:, 2] - 9) % (model.d_vocab - 10)
    right = [LETTERS[row % 4] for row in range(n)]
    return replace(
        task_of_tokens(clean, corrupted),
        answers=torch.tensor(right)[:, None],
        wrong=torch.tensor([[letter for letter in LETTERS if letter != answer] for answer in right]),
        positions={
            "END": torch.full((n,), LENGTH - 1),
            "A": torch.arange(n) % LENGTH,
            "B": torch.arange(n) * 3 % LENGTH,
        },
    )


def labelled_task(model, n=6, seed=0):
    """Random prompts in which all four letters stand, in any order; RIGHT is where the answer does."""
    generator = torch.Generator().manual_seed(seed)
    task = choice_task(model, n, seed)
    clean = torch.randint(10, model.d_vocab, (n, 2 * LENGTH), generator=generator)
    order = torch.stack([torch.randperm(4, generator=generator) for _ in range(n)])
    places = torch.tensor([1, 3, 6, 8]).expand(n, 4)
    clean.scatter_(1, places, torch.tensor(LETTERS)[order])
    corrupted = clean.clone()
    corrupted[:, 10] = 10 + (corrupted[:, 10] - 9) % (model.d_vocab - 10)
    of_letter = torch.empty_like(places).scatter(1, order, places)  # where each letter stands
    positions = {f"LABEL{number + 1}": places[:, number] for number in range(4)}
    right = torch.tensor([LETTERS.index(answer) for answer in task.answers[:, 0].tolist()])
    positions |= {"RIGHT": of_letter[torch.arange(n), right], "FIVE": of_letter[:, LETTERS.index(5)]}
    return replace(
        task_of_tokens(clean, corrupted),
        answers=task.answers,
        wrong=task.wrong,
        positions={**positions, "END": torch.full((n,), 2 * LENGTH - 1)},
    )


def joined(one, other):
    """The prompts of two tasks in turn, as one task."""
    rows = [(task, row) for row in range(len(one)) for task in (one, other)]
    picked = {
        name: tuple(getattr(task, name)[row] for task, row in rows)
        for name in ("clean_ids", "corrupted_ids", "clean_text", "corrupted_text", "str_tokens", "corrupted_str_tokens")
    }
    tensors = {name: torch.stack([getattr(task, name)[row] for task, row in rows]) for name in ("answers", "wrong")}
    positions = {name: torch.stack([task.positions[name][row] for task, row in rows]) for name in one.positions}
    return replace(one, **picked, **tensors, positions=positions, index=torch.arange(len(rows)))
