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


class Chunk(NamedTuple):
    """Sequences for one forward pass."""

    tokens: Int[Tensor, "sequence pos"]
    rows: Int[Tensor, " sequence"] | None
    """Which rows of the tensor given these are; None for text that is not one tensor."""


@dataclass(frozen=True)
class Text:
    """Text as chunks."""

    name: str
    """What it is, for manifests; of token ids a digest."""
    length: int
    """Tokens a sequence."""
    chunk_size: int
    """Sequences a chunk, at most."""
    chunks_from: Callable[[int], Iterator[Chunk]]
    """The chunks from this number on. All but iterators begin again at their end."""


def open_text(model: Model, text: TextSource, *, length: int, chunk_tokens: int, seed: int) -> Text:
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

    Raises:
        ValueError: if there is no such text, or it is empty.
    """
    chunk_size = max(1, chunk_tokens // length)
    if isinstance(text, str) and text == "natural":
        tokens = natural_text(model, None, length).cpu()
        return Text("natural", length, chunk_size, _shuffled(tokens, chunk_size, seed))
    if isinstance(text, str | Path):
        name, documents = _documents(text)

        def rows() -> Iterator[Tensor]:
            found = False
            while True:
                for row in _rows(model, documents(), length):
                    found = True
                    yield row[None]
                if not found:
                    raise ValueError(f"{name} holds less than {length} tokens of text")

        return Text(name, length, chunk_size, _in_order(rows, chunk_size))
    if isinstance(text, Tensor):
        if text.dim() != 2 or text.numel() == 0:
            raise ValueError(f"the text has shape {tuple(text.shape)}; token ids are [sequence, pos]")
        ids = text.cpu()
        name = f"tokens {hashlib.sha256(ids.long().numpy().tobytes()).hexdigest()[:16]}"
        chunk_size = max(1, chunk_tokens // ids.shape[1])
        return Text(name, ids.shape[1], chunk_size, _shuffled(ids, chunk_size, seed))
    given = iter(text)
    first = next(given, None)
    if first is None:
        raise ValueError("the text holds nothing: the iterable gave no tensor")
    chunk_size = max(1, chunk_tokens // first.shape[1])
    return Text("iterable", first.shape[1], chunk_size, _in_order(lambda: itertools.chain([first], given), chunk_size))


def _shuffled(tokens: Int[Tensor, "sequence pos"], size: int, seed: int) -> Callable[[int], Iterator[Chunk]]:
    a_epoch = -(-len(tokens) // size)

    def chunks(start: int) -> Iterator[Chunk]:
        for epoch in itertools.count(start // a_epoch):
            order = torch.randperm(len(tokens), generator=generator(seed, "text", epoch)).split(size)
            first = start % a_epoch if epoch == start // a_epoch else 0
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


def _documents(text: str | Path) -> tuple[str, Callable[[], Iterator[str]]]:
    path = Path(text)
    files = sorted(path.glob("**/*.txt")) if path.is_dir() else [path] if path.is_file() else []
    if files:
        return str(text), lambda: (file.read_text(encoding="utf-8", errors="replace") for file in files)
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise ValueError(
            f"{str(text)!r} is neither 'natural' nor a folder of .txt files; for data sets: pip install datasets"
        ) from None

    def stream() -> Iterator[str]:
        rows: Any = datasets.load_dataset(str(text), split="train", streaming=True)
        for row in rows:
            if "text" not in row:
                raise ValueError(f"{text}: its rows have no column 'text'; they have {', '.join(row)}")
            yield row["text"]

    return str(text), stream


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
