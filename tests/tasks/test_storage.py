"""Tasks from files, and one-line errors that name file, line and field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import interp
from interp import tasks

PAIR = {
    "clean": "When Mary and John went, John said to",
    "corrupted": "When Mary and John went, Mary said to",
    "answer": " Mary",
    "wrong": " John",
}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_jsonl_and_csv_give_what_from_pairs_gives(tiny_llama: interp.Model, tmp_path: Path):
    expected = tasks.from_pairs(tiny_llama, [PAIR])
    jsonl = write(tmp_path / "mine.jsonl", PAIR, "\n")
    quoted = ",".join(f'"{value}"' for value in PAIR.values())
    table = write(tmp_path / "mine.csv", ",".join(PAIR) + "\n", quoted + "\n")
    for path in (jsonl, table):
        task = tasks.read(tiny_llama, path)
        assert task.name == "mine"
        assert task.clean_ids == expected.clean_ids
        assert task.answers.equal(expected.answers)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((PAIR, "{oops\n"), r"mine.jsonl, line 2: not JSON \(.* at column 2\)"),
        ((PAIR, "\n", "[1]\n"), "mine.jsonl, line 3: not a JSON object with the fields clean"),
        ((PAIR, PAIR | {"answer": None}), "mine.jsonl, line 2: field 'answer' is missing"),
        ((PAIR | {"corrupted": "When"},), "mine.jsonl, line 1: clean is 9 tokens and corrupted 1"),
        (("",), "mine.jsonl: no prompt pairs in it"),
    ],
)
def test_bad_jsonl(rows: tuple[object, ...], message: str, tiny_llama: interp.Model, tmp_path: Path):
    with pytest.raises(ValueError, match=message) as caught:
        tasks.read(tiny_llama, write(tmp_path / "mine.jsonl", *rows))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clean,corrupted,answer,wrong\na,b\n", "mine.csv, line 2: field 'answer' is missing"),
        ("clean,corrupted,answer,wrong\na,b,c,d,e\n", "mine.csv, line 2: more cells than columns"),
        ('clean,corrupted,answer,wrong\n"a"b,c,d,e\n', "mine.csv, line 2: not CSV"),
        ("prompt,answer\na,b\n", "mine.csv, line 2: field 'prompt' is unknown"),
    ],
)
def test_bad_csv(text: str, message: str, tiny_llama: interp.Model, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        tasks.read(tiny_llama, write(tmp_path / "mine.csv", text))


def test_bad_names_and_bytes(tiny_llama: interp.Model, tmp_path: Path):
    with pytest.raises(ValueError, match=r"must end in \.jsonl or \.csv"):
        tasks.read(tiny_llama, tmp_path / "mine.txt")
    (tmp_path / "mine.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        tasks.read(tiny_llama, tmp_path / "mine.jsonl")


def saved_rows(model: interp.Model, path: Path) -> list[dict[str, object]]:
    tasks.from_pairs(model, [PAIR, PAIR | {"answer": [" Mary", " Anna"]}]).to_jsonl(path)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("row", "change", "message"),
    [
        (0, {"version": 9}, r"line 1: field 'format' is 'interp.task' version 9; this reads"),
        (0, {"format": "other"}, "line 1: field 'format' is 'other'"),
        (0, {"prompts": 3}, "2 prompts.* 3"),
        (0, {"metric": None}, "line 1: field 'metric' is missing"),
        (0, {"metric": "nope"}, "'nope' is not a metric"),
        (2, {"answers": None}, "line 3: field 'answers' is missing or not list"),
        (2, {"answers": [10**6]}, r"line 3: field 'answers' has 1000000; token ids of tiny-llama run 0\.\."),
        (1, {"positions": {"END": "9"}}, "line 2: field 'positions' has a position that is not a whole number"),
        (1, {"positions": {"END": 99}}, "pair 0: position 'END' is 99"),
        (2, {"positions": {}}, "position 'END' is not given for every prompt"),
        (1, {"clean_tokens": ["a"]}, "line 2: field 'clean_ids' is other text for the tokenizer of tiny-llama"),
    ],
)
def test_damaged_saved_tasks(
    row: int, change: dict[str, object], message: str, tiny_llama: interp.Model, tmp_path: Path
):
    rows = saved_rows(tiny_llama, tmp_path / "task.jsonl")
    rows[row] |= change
    with pytest.raises(ValueError, match=message):
        tasks.read(tiny_llama, write(tmp_path / "task.jsonl", *rows))


def test_a_task_of_another_tokenizer_is_refused(
    tiny_llama: interp.Model, tokenised_as: Callable[[str], interp.Model], tmp_path: Path
):
    saved_rows(tiny_llama, tmp_path / "task.jsonl")
    with pytest.raises(ValueError, match=r"task.jsonl, line 2: .*tokenizer of pairs"):
        tasks.read(tokenised_as("pairs"), tmp_path / "task.jsonl")


def test_a_failed_write_leaves_the_old_file(tiny_llama: interp.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "task.jsonl"
    saved_rows(tiny_llama, path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        tasks.from_pairs(tiny_llama, [PAIR]).to_jsonl(path)
    assert path.read_bytes() == before
    assert [left.name for left in tmp_path.iterdir()] == ["task.jsonl"]
