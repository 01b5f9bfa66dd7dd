"""The files of a job's cells: each cell is a folder that is there whole or not at all.

A cell is written beside its place, in a hidden folder, and renamed. `cell.json` says what the cell depends on (by a
digest) and what its other files hold (by theirs), so that a later job takes it only if both are as they should be.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from interp.model import Model
from interp.patching.labels import model_provenance
from interp.patching.writing import PART
from interp.tasks import Task

FORMAT = "interp.cell"
FORMAT_VERSION = 1
RECORD = "cell.json"
_OLD = ".old"


def write_cell(folder: Path, digest: str, about: Mapping[str, Any], write: Callable[[Path], None]) -> None:
    """Write a cell, whole or not at all, in the place of an older one.

    Args:
        folder: where it is to be; its name must not begin with a dot.
        digest: of what it depends on.
        about: what `cell.json` says of it.
        write: writes the other files into the folder it is given.
    """
    with _whole(folder) as part:
        write(part)
        files = {path.name: _sha256(path) for path in sorted(part.iterdir())}
        record = {"format": FORMAT, "version": FORMAT_VERSION, "digest": digest, **about, "files": files}
        (part / RECORD).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8", newline="\n")


def read_cell(folder: Path, digest: str) -> dict[str, Any] | None:
    """What `cell.json` says, if the cell has this digest and its files are what they were; else None."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        own = (record["format"], record["version"], record["digest"]) == (FORMAT, FORMAT_VERSION, digest)
        whole = own and all(_sha256(folder / name) == known for name, known in record["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent or damaged
        return None
    return record if whole else None


def remove_leftovers(out: Path) -> None:
    """Remove what a killed job was writing."""
    for path in out.glob("*/*/.*"):
        if path.name.endswith((PART, _OLD)):
            shutil.rmtree(path)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    part, old = (folder.with_name(f".{folder.name}{ending}") for ending in (PART, _OLD))
    for path in (part, old):
        if path.exists():
            shutil.rmtree(path)
    part.mkdir(parents=True)
    yield part
    if folder.exists():
        os.replace(folder, old)  # a folder with files in it cannot be renamed over
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# What a cell depends on


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of what can be written as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def model_content(model: Model) -> dict[str, Any]:
    """What a result depends on in a model: name, place, versions, configuration, and a digest of every weight.

    Reads all weights: about a second for each gigabyte.
    """
    digest = hashlib.sha256()
    for name, tensor in model.hf.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = {
        name: value
        for name, value in model.hf.config.to_dict().items()
        if name not in ("_name_or_path", "transformers_version")  # where it came from
    }
    return {
        **model_provenance(model),
        "numpy": np.__version__,
        "config": json.loads(json.dumps(config, sort_keys=True, default=str)),
        "weights": digest.hexdigest(),
    }


def task_content(task: Task) -> dict[str, Any]:
    """What a result depends on in a task."""
    return {
        "name": task.name,
        "metric": task.metric,
        "seed": task.seed,
        "prompts": [task.clean_ids, task.corrupted_ids, task.answers.tolist(), task.wrong.tolist()],
        "positions": {name: where.tolist() for name, where in task.positions.items()},
    }
