"""The curve of a training: log.csv, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

FILE = "log.csv"
COLUMNS = (
    "step",
    "tokens",
    "site",
    "loss",
    "reconstruction",
    "sparsity",
    "auxiliary",
    "l0",
    "explained_variance",
    "dead",
    "learning_rate",
    "tokens_per_second",
)
"""Of the batch of that step: the loss and its terms, active features a token, 1 − squared error / squared distance to
the batch's mean, share of features that are dead, and how fast training went since the row before."""


class TrainingLog:
    """Writes rows of numbers as they come; use it as a context.

    Args:
        folder: where `log.csv` is, or None to write nothing.
        steps_done: rows of later steps, written before an interruption, are taken out: they will come again.

    Raises:
        ValueError: if `log.csv` is there and is no such log.
    """

    def __init__(self, folder: Path | None, steps_done: int) -> None:
        self._file: IO[str] | None = None
        self._board: Any = None
        if folder is None:
            return
        path = folder / FILE
        kept = _rows_until(path, steps_done)
        part = path.with_name(f".{FILE}.part")
        with part.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *kept])
        os.replace(part, path)
        self._file = path.open("a", newline="", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=steps_done + 1)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, row: Mapping[str, str | float | int]) -> None:
        """Add a row, which has every column."""
        if self._file is None:
            return
        csv.writer(self._file, lineterminator="\n").writerow([row[column] for column in COLUMNS])
        self._file.flush()
        if self._board is not None:
            for name in COLUMNS[3:]:
                self._board.add_scalar(f"{row['site']}/{name}", row[name], row["step"])


def _rows_until(path: Path, step: int) -> list[list[str]]:
    """Whole rows of steps up to this one; the last row of a killed run may be torn."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if tuple(header) != COLUMNS:
        raise ValueError(f"{path} is not the log of a training: it would be overwritten; give another folder")
    return [row for row in rows if len(row) == len(COLUMNS) and row[0].isdigit() and int(row[0]) <= step]
