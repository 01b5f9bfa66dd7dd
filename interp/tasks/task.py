"""`Task`: clean/corrupted prompt pairs with their answers, as tokens, ready for any model of that tokenizer."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from interp.metrics import PADDING, metric_named

FORMAT = "interp.task"
FORMAT_VERSION = 1

Rows = tuple[tuple[int, ...], ...]
Labels = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False, repr=False)
class Task:
    """Prompt pairs that differ in what the behaviour depends on, and the answers that tell them apart.

    The answer is always read at the last token. Everything is checked when a task is made: each pair has one length
    and differs somewhere, each prompt has an answer, positions lie inside their prompt.

    Raises:
        ValueError: naming the pair and what is wrong with it.
    """

    name: str
    """What the behaviour is called."""
    clean_ids: Rows
    """Tokens of each clean prompt."""
    corrupted_ids: Rows
    """Tokens of each corrupted prompt, aligned with the clean ones."""
    answers: Int[Tensor, "prompt n_answers"]
    """Token ids of the right answers, padded with −1."""
    wrong: Int[Tensor, "prompt n_wrong"]
    """Token ids of the wrong answers, padded with −1."""
    positions: Mapping[str, Int[Tensor, "prompt"]]
    """Key positions by name; "END" is the last token."""
    metric: str
    """Name of the task's metric in `interp.metrics.METRICS`."""
    clean_text: tuple[str, ...]
    """The clean prompts as text."""
    corrupted_text: tuple[str, ...]
    """The corrupted prompts as text."""
    str_tokens: Labels
    """The text of each token of the clean prompts."""
    corrupted_str_tokens: Labels
    """The text of each token of the corrupted prompts."""
    index: Int[Tensor, "prompt"]
    """Row of each prompt in the task that this one was taken from."""
    description: str = ""
    """The behaviour in a sentence."""
    corruption: str = ""
    """How the corrupted prompts were made."""
    seed: int | None = None
    """Seed of the choice of prompts; None for a user's own."""

    def __post_init__(self) -> None:
        metric_named(self.metric)
        if not self.clean_ids:
            raise ValueError(f"the task {self.name!r} has no prompts")
        counts = {
            field.name: len(getattr(self, field.name))
            for field in fields(self)
            if field.name not in ("name", "positions", "metric", "description", "corruption", "seed")
        } | {f"positions[{name!r}]": len(where) for name, where in self.positions.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"the task {self.name!r} has parts of different length: {counts}")
        for row in range(len(self)):
            try:
                self._check_pair(row)
            except ValueError as error:
                raise ValueError(f"pair {row}: {error}") from None

    def _check_pair(self, row: int) -> None:
        clean = self.clean_ids[row]
        check_aligned(clean, self.corrupted_ids[row], self.str_tokens[row], self.corrupted_str_tokens[row])
        right = {token for token in self.answers[row].tolist() if token != PADDING}
        if not right:
            raise ValueError("no answer")
        both = right & set(self.wrong[row].tolist())
        if both:
            raise ValueError(f"token {both.pop()} is both a right and a wrong answer")
        for name, where in self.positions.items():
            if not 0 <= int(where[row]) < len(clean):
                raise ValueError(f"position {name!r} is {int(where[row])}; positions run 0..{len(clean) - 1}")

    def __len__(self) -> int:
        return len(self.clean_ids)

    def __repr__(self) -> str:
        lengths = sorted(self._lengths())
        tokens = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        return f"Task({self.name}: {len(self)} prompt pairs of {tokens} tokens, {self.metric})"

    def __getitem__(self, rows: int | slice | Sequence[int]) -> Task:
        """The task with these prompts only, in this order; `index` says where they came from."""
        if isinstance(rows, int):
            chosen = [range(len(self))[rows]]
        elif isinstance(rows, slice):
            chosen = list(range(len(self)))[rows]
        else:
            chosen = [range(len(self))[int(row)] for row in rows]

        def pick(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[row] for row in chosen)

        return replace(
            self,
            clean_ids=pick(self.clean_ids),
            corrupted_ids=pick(self.corrupted_ids),
            answers=self.answers[chosen],
            wrong=self.wrong[chosen],
            positions={name: where[chosen] for name, where in self.positions.items()},
            clean_text=pick(self.clean_text),
            corrupted_text=pick(self.corrupted_text),
            str_tokens=pick(self.str_tokens),
            corrupted_str_tokens=pick(self.corrupted_str_tokens),
            index=self.index[chosen],
        )

    @property
    def clean(self) -> Int[Tensor, "prompt pos"]:
        """The clean prompts as one tensor.

        Raises:
            ValueError: if the prompts have several lengths.
        """
        return self._stacked(self.clean_ids)

    @property
    def corrupted(self) -> Int[Tensor, "prompt pos"]:
        """The corrupted prompts as one tensor.

        Raises:
            ValueError: if the prompts have several lengths.
        """
        return self._stacked(self.corrupted_ids)

    def _stacked(self, rows: Rows) -> Int[Tensor, "prompt pos"]:
        if len(self._lengths()) > 1:
            found = ", ".join(f"{count} of {length} tokens" for length, count in sorted(self._lengths().items()))
            raise ValueError(f"the prompts have several lengths ({found}); use task.by_length()")
        return torch.tensor(rows)

    def _lengths(self) -> Counter[int]:
        return Counter(len(row) for row in self.clean_ids)

    def by_length(self) -> tuple[Task, ...]:
        """One task a prompt length, shortest first, prompts in order; `index` holds their rows in this task."""
        whole = replace(self, index=torch.arange(len(self)))
        return tuple(
            whole[[row for row, ids in enumerate(self.clean_ids) if len(ids) == length]]
            for length in sorted(self._lengths())
        )

    @property
    def first_difference(self) -> Int[Tensor, "prompt"]:
        """The first position where clean and corrupted differ: no causal model can tell them apart before it."""
        return torch.tensor([_first_difference(*pair) for pair in zip(self.clean_ids, self.corrupted_ids, strict=True)])

    @property
    def position_labels(self) -> tuple[str, ...]:
        """What stands at each position, for an axis over all prompts.

        The token's text where all clean prompts agree; else the key positions that fall there ("S2", "IO/S1"); else
        "…".

        Raises:
            ValueError: if the prompts have several lengths.
        """
        columns = self.clean.T.tolist()
        return tuple(self._label(position, column) for position, column in enumerate(columns))

    def _label(self, position: int, column: list[int]) -> str:
        if len(set(column)) == 1:
            return self.str_tokens[0][position]
        return "/".join(name for name, where in self.positions.items() if bool((where == position).any())) or "…"

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write the task for `interp.tasks.read`: a line about the whole, then a line a prompt.

        The file is written beside its place and renamed, so that a run killed half-way leaves no torn file.
        """
        path = Path(path)
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "name": self.name,
            "metric": self.metric,
            "description": self.description,
            "corruption": self.corruption,
            "seed": self.seed,
            "prompts": len(self),
        }
        lines = [header, *(self._row(row) for row in range(len(self)))]
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            unfinished.write_text(
                "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8", newline="\n"
            )
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def _row(self, row: int) -> dict[str, Any]:
        return {
            "clean": self.clean_text[row],
            "corrupted": self.corrupted_text[row],
            "clean_ids": self.clean_ids[row],
            "corrupted_ids": self.corrupted_ids[row],
            "clean_tokens": self.str_tokens[row],
            "corrupted_tokens": self.corrupted_str_tokens[row],
            "answers": [token for token in self.answers[row].tolist() if token != PADDING],
            "wrong": [token for token in self.wrong[row].tolist() if token != PADDING],
            "positions": {name: int(where[row]) for name, where in self.positions.items()},
            "index": int(self.index[row]),
        }


def check_aligned(
    clean: Sequence[int], corrupted: Sequence[int], clean_tokens: Sequence[str], corrupted_tokens: Sequence[str]
) -> None:
    """Make sure that two prompts can be patched into each other position by position.

    Raises:
        ValueError: if they differ in length (with the tokens of both and the first difference) or not at all.
    """
    if len(clean) != len(corrupted):
        raise ValueError(
            f"clean is {len(clean)} tokens and corrupted {len(corrupted)}; they must align token by token. They first "
            f"differ at position {_first_difference(clean, corrupted)}: clean {list(clean_tokens)}, corrupted "
            f"{list(corrupted_tokens)}"
        )
    if tuple(clean) == tuple(corrupted):
        raise ValueError(f"clean and corrupted are the same tokens, {list(clean_tokens)}")


def padded_ids(rows: Sequence[Sequence[int]]) -> Int[Tensor, "prompt n_ids"]:
    """Token ids of each prompt as one tensor, short rows filled up with −1."""
    width = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[PADDING] * (width - len(row))] for row in rows], dtype=torch.long).reshape(
        len(rows), width
    )


def _first_difference(clean: Sequence[int], corrupted: Sequence[int]) -> int:
    """First position where two prompts differ; the end of the shorter one if it begins the longer."""
    differing = (at for at, (one, other) in enumerate(zip(clean, corrupted, strict=False)) if one != other)
    return next(differing, min(len(clean), len(corrupted)))
