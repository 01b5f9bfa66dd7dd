"""Reading tasks from files: a user's own pairs (JSONL or CSV), or what `Task.to_jsonl` wrote."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interp.model.images import FIRST_ID
from interp.tasks.pairs import FIELDS, assemble, tokenise_fields
from interp.tasks.task import FORMAT, FORMAT_VERSION, Task, padded_ids

if TYPE_CHECKING:
    from interp.model import Model

SAVED_FIELDS = {
    "clean": str,
    "corrupted": str,
    "clean_ids": list,
    "corrupted_ids": list,
    "clean_tokens": list,
    "corrupted_tokens": list,
    "answers": list,
    "wrong": list,
    "positions": dict,
    "index": int,
}


def read(model: Model, path: str | os.PathLike[str], *, first_token: bool = False, metric: str = "logit_diff") -> Task:
    """A task from a file.

    Three kinds: JSONL of your own, one pair a line, with the fields of `from_pairs`; CSV with these as column names
    (one answer a row); and JSONL written by `Task.to_jsonl`, which comes back exactly as it was, if the model has the
    same tokens.

    Args:
        model: whose tokenizer is used.
        path: a file whose name ends in .jsonl or .csv.
        first_token: as in `from_pairs`; a saved task has its answers already.
        metric: as in `from_pairs`; a saved task has its own.

    Raises:
        ValueError: in one line, naming file, line and field; nothing is half-loaded.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"{path}: the name must end in .jsonl or .csv")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    lines = _csv_lines(path, text) if path.suffix == ".csv" else _json_lines(path, text)
    numbered = list(lines)
    if not numbered:
        raise ValueError(f"{path}: no prompt pairs in it")
    if "format" in numbered[0][1]:
        return _saved_task(model, path, numbered)
    labelled = [(f"{path}, line {line}", fields) for line, fields in numbered]
    tokenised = tokenise_fields(model, labelled, first_token=first_token, metric=metric)
    return assemble(tokenised, name=path.stem, metric=metric, description="", corruption="as given")


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object with the fields {', '.join(FIELDS)}")
        yield number, fields


def _csv_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for fields in rows:
            if None in fields:
                raise ValueError(
                    f"{path}, line {rows.line_num}: more cells than columns ({len(rows.fieldnames or ())})"
                )
            yield rows.line_num, dict(fields)
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.reader.line_num}: not CSV ({error})") from None


def _saved_task(model: Model, path: Path, numbered: list[tuple[int, dict[str, Any]]]) -> Task:
    """The task that `Task.to_jsonl` wrote."""
    (_, header), *rows = numbered
    _check_header(path, header, len(rows))
    for line, fields in rows:
        try:
            _check_saved_row(model, fields)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from None
    columns = {name: [fields[name] for _, fields in rows] for name in SAVED_FIELDS}
    names = list(columns["positions"][0])
    try:
        return Task(
            name=header["name"],
            clean_ids=tuple(map(tuple, columns["clean_ids"])),
            corrupted_ids=tuple(map(tuple, columns["corrupted_ids"])),
            answers=padded_ids(columns["answers"]),
            wrong=padded_ids(columns["wrong"]),
            positions={name: torch.tensor([where[name] for where in columns["positions"]]) for name in names},
            metric=header["metric"],
            clean_text=tuple(columns["clean"]),
            corrupted_text=tuple(columns["corrupted"]),
            str_tokens=tuple(map(tuple, columns["clean_tokens"])),
            corrupted_str_tokens=tuple(map(tuple, columns["corrupted_tokens"])),
            index=torch.tensor(columns["index"]),
            description=header["description"],
            corruption=header["corruption"],
            seed=header["seed"],
        )
    except KeyError as error:
        raise ValueError(f"{path}: position {error} is not given for every prompt") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_header(path: Path, header: dict[str, Any], n_rows: int) -> None:
    if header["format"] != FORMAT or header.get("version") != FORMAT_VERSION:
        found = f"{header['format']!r} version {header.get('version')!r}"
        raise ValueError(f"{path}, line 1: field 'format' is {found}; this reads {FORMAT!r} version {FORMAT_VERSION}")
    for name in ("name", "metric", "description", "corruption"):
        if not isinstance(header.get(name), str):
            raise ValueError(f"{path}, line 1: field {name!r} is missing or not text")
    if not isinstance(header.get("seed"), int | None):
        raise ValueError(f"{path}, line 1: field 'seed' is {header['seed']!r}; it must be a number or null")
    if not n_rows or header.get("prompts") != n_rows:
        raise ValueError(
            f"{path}: {n_rows} prompts where line 1 announces {header.get('prompts')!r}; it may be cut off"
        )


def _is_known(model: Model, token: int) -> bool:
    """Whether a model has this token.

    Raises:
        ValueError: if it stands for an image that the model has not been shown.
    """
    return 0 <= token < model.d_vocab or (token >= FIRST_ID and bool(model.images[token]))


def _check_saved_row(model: Model, fields: dict[str, Any]) -> None:
    for name, kind in SAVED_FIELDS.items():
        if not isinstance(fields.get(name), kind):
            raise ValueError(f"field {name!r} is missing or not {kind.__name__}")
    for name in ("clean_ids", "corrupted_ids", "answers", "wrong"):
        outside = [one for one in fields[name] if not isinstance(one, int) or not _is_known(model, one)]
        if outside:
            raise ValueError(f"field {name!r} has {outside[0]!r}; token ids of {model.name} run 0..{model.d_vocab - 1}")
    for ids, tokens in (("clean_ids", "clean_tokens"), ("corrupted_ids", "corrupted_tokens")):
        here = model.to_str_tokens(fields[ids]) if fields[ids] else []
        if here != fields[tokens]:
            raise ValueError(
                f"field {ids!r} is other text for the tokenizer of {model.name}: {here}, saved as {fields[tokens]}; "
                "make the task again from its text"
            )
    if not all(isinstance(where, int) for where in fields["positions"].values()):
        raise ValueError("field 'positions' has a position that is not a whole number")
