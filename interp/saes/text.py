"""Text for training as chunks of token sequences, in an order that can be taken up again from any chunk."""

from __future__ import annotations

import hashlib
import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from interp.model import Model
from interp.saes.randomness import generator
from interp.tasks import natural_text

TextSource = Int[Tensor, "sequence pos"] | Iterable[Int[Tensor, "sequence pos"]] | str | Path
"""Token ids of one length, an iterable of such tensors, or a name: "natural", a folder or file of text, a data set."""

PIECE = 2**20
"""Characters of a file that are tokenised at once, about."""


class Chunk(NamedTuple):
    """Sequences for one forward pass."""

    tokens: Int[Tensor, "sequence pos"]
    rows: Int[Tensor, " sequence"] | None
    """Which rows of the tensor given these are; None for text that is not one tensor."""


@dataclass(frozen=True)
class Text:
    """Text as chunks."""

    name: str
    """What it is, for manifests: by this it is known again. Of token ids a digest, of files their number and size."""
    length: int
    """Tokens a sequence."""
    chunk_size: int
    """Sequences a chunk, at most."""
    chunks_from: Callable[[int], Iterator[Chunk]]
    """The chunks from this number on."""
    n_sequences: int | None = None
    """Of the tensor given; None for text that is not one tensor."""


def open_text(
    model: Model, text: TextSource, *, length: int, chunk_tokens: int, seed: int, repeat: bool = True
) -> Text:
    """Text of any form as chunks.

    * token ids [sequence, pos]: in a new order every epoch;
    * an iterable of such tensors: in its own order, once. To go on after an interruption it is read from its beginning;
    * "natural": `interp.tasks.natural_text`, all there is (some hundred thousand tokens), again and again;
    * a folder of .txt files, or one file: in the order of their names, as one stream cut into rows;
    * any other name: a data set of the Hugging Face hub or a folder that `datasets` reads; its split "train" and column
      "text", streamed.

    A row of text begins with the BOS where the model's tokenizer adds one.

    Args:
        model: its tokenizer reads text.
        text: what to read.
        length: tokens a sequence of text; of token ids it is their own.
        chunk_tokens: tokens a chunk, about: one sequence at least.
        seed: of the order of token ids.
        repeat: all but iterables begin again at their end.

    Raises:
        ValueError: if there is no such text, it is empty, or it is not token ids.
    """
    if isinstance(text, str | Path):
        if length < 2:
            raise ValueError(f"length={length}; a row of text has 2 tokens or more")
        if str(text) == "natural":
            return _ids("natural text", natural_text(model, None, length), chunk_tokens, seed, repeat)
        return _documents(model, text, length, max(1, chunk_tokens // length), repeat)
    if isinstance(text, Tensor):
        _check_ids(text)
        return _ids("tokens", text, chunk_tokens, seed, repeat)
    given = iter(text)
    first = next(given, None)
    if first is None:
        raise ValueError("the text holds nothing: the iterable gave no tensor")
    _check_ids(first)
    chunk_size = max(1, chunk_tokens // first.shape[1])
    name = f"iterable that begins with {_digest(first)}"
    return Text(name, first.shape[1], chunk_size, _in_order(lambda: itertools.chain([first], given), chunk_size))


def _ids(kind: str, given: Int[Tensor, "sequence pos"], chunk_tokens: int, seed: int, repeat: bool) -> Text:
    ids = given.cpu()
    size = max(1, chunk_tokens // ids.shape[1])
    return Text(f"{kind} {_digest(ids)}", ids.shape[1], size, _shuffled(ids, size, seed, repeat), n_sequences=len(ids))


def _check_ids(text: Any) -> None:
    if not isinstance(text, Tensor):
        what = f"the text is an iterable of {type(text).__name__}"
        raise ValueError(f"{what}; give tensors of token ids [sequence, pos], or a folder of .txt files")
    if text.dim() != 2 or text.numel() == 0 or text.is_floating_point():
        raise ValueError(f"the text has shape {tuple(text.shape)}, {text.dtype}; token ids are [sequence, pos]")


def _digest(ids: Int[Tensor, "sequence pos"]) -> str:
    return hashlib.sha256(ids.cpu().long().numpy().tobytes()).hexdigest()[:16]


def _shuffled(
    tokens: Int[Tensor, "sequence pos"], size: int, seed: int, repeat: bool
) -> Callable[[int], Iterator[Chunk]]:
    a_epoch = -(-len(tokens) // size)

    def chunks(start: int) -> Iterator[Chunk]:
        begin = start // a_epoch
        for epoch in itertools.count(begin) if repeat else range(begin, 1):
            order = torch.randperm(len(tokens), generator=generator(seed, "text", epoch)).split(size)
            first = start % a_epoch if epoch == begin else 0
            for rows in order[first:]:
                yield Chunk(tokens[rows], rows)

    return chunks


def _in_order(tensors: Callable[[], Iterator[Tensor]], size: int) -> Callable[[int], Iterator[Chunk]]:
    def pieces() -> Iterator[Chunk]:
        held: list[Tensor] = []
        for one in tensors():
            if one.dim() != 2 or (held and one.shape[1] != len(held[0])):
                raise ValueError(f"the text changes shape: {tuple(one.shape)}; sequences are of one length")
            held.extend(one.cpu())
            while len(held) >= size:
                yield Chunk(torch.stack(held[:size]), None)
                del held[:size]
        if held:
            yield Chunk(torch.stack(held), None)

    return lambda start: itertools.islice(pieces(), start, None)


def _documents(model: Model, text: str | Path, length: int, chunk_size: int, repeat: bool) -> Text:
    """Rows of files or of a data set."""
    name, documents = _files(Path(text)) or _data_set(str(text))

    def rows() -> Iterator[Tensor]:
        found = False
        while True:
            for row in _rows(model, documents(), length):
                found = True
                yield row[None]
            if not found:
                raise ValueError(f"{name} holds less than {length} tokens of text")
            if not repeat:
                return

    return Text(name, length, chunk_size, _in_order(rows, chunk_size))


def _files(path: Path) -> tuple[str, Callable[[], Iterator[str]]] | None:
    files = sorted(path.glob("**/*.txt")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        return None
    size = sum(file.stat().st_size for file in files)
    return f"{path} ({len(files)} files, {size} bytes)", lambda: itertools.chain.from_iterable(map(_pieces, files))


def _pieces(file: Path) -> Iterator[str]:
    """A file's text in pieces that end with a line: a file of gigabytes is neither held nor tokenised at once."""
    with file.open(encoding="utf-8", errors="replace") as opened:
        while lines := opened.readlines(PIECE):
            yield "".join(lines)


def _data_set(name: str) -> tuple[str, Callable[[], Iterator[str]]]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise ValueError(
            f"{name!r} is neither 'natural' nor a folder of .txt files; for data sets: pip install datasets"
        ) from None

    def stream() -> Iterator[str]:
        rows: Any = datasets.load_dataset(name, split="train", streaming=True)
        for row in rows:
            if "text" not in row:
                raise ValueError(f"{name}: its rows have no column 'text'; they have {', '.join(row)}")
            yield row["text"]

    return name, stream


def _rows(model: Model, documents: Iterable[str], length: int) -> Iterator[Int[Tensor, " pos"]]:
    """Documents one after another, cut into rows; what is left at the end is dropped."""
    held = torch.empty(0, dtype=torch.long)
    for document in documents:
        if not document.strip():
            continue
        ids = model.to_tokens(document)[0].cpu()
        has_bos = int(ids[0]) == getattr(model.tokenizer, "bos_token_id", None)
        bos, body = ids[: int(has_bos)], ids[int(has_bos) :]
        held = torch.cat([held, body])
        width = length - len(bos)
        n_rows = len(held) // width
        for row in held[: n_rows * width].view(n_rows, width):
            yield torch.cat([bos, row])
        held = held[n_rows * width :]
