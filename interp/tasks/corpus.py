"""Natural text that is on every machine: the documentation inside the Python packages that `interp` depends on.

Sinks, massive activations and sparse autoencoders are measured on text of no particular kind, and no data set can be
counted on offline. Docstrings can: they hold some three million characters of English prose. They are read as text
(nothing is imported), cut into paragraphs, and only those that read like prose are kept: no lists, code or tables.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
import os
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from interp.model import Model

_PACKAGES = ("networkx", "numpy", "pandas", "scipy", "sklearn", "torch", "xarray")
_SKIPPED = {"__pycache__", "idlelib", "lib2to3", "site-packages", "dist-packages", "test", "tests", "testing"}

_CHARACTERS_A_TOKEN = 6
"""More than any common tokenizer makes of a token of English, so that a passage is rarely too short."""
_MIN_CHARACTERS = 120

_QUOTED = re.compile(r"(\"\"\"|''')(.*?)\1", re.DOTALL)
_ROLE = re.compile(r":[a-z:]+:`[~!]?([^`<]*?)(?: <[^>]*>)?`")
_SENTENCES = re.compile(r"[A-Z][\w ,.;:'\"()\-/%?!]*[.!?]")
_COMMON = re.compile(
    r"\b(a|an|and|are|as|at|be|been|but|by|can|do|each|for|from|has|have|if|in|into|is|it|its|may|more|not|of|on|only|or"
    r"|other|same|should|so|such|than|that|the|their|then|there|these|they|this|to|used|using|was|we|when|where|which"
    r"|while|will|with|you)\b",
    re.IGNORECASE,
)
_COMMON_SHARE = 0.35
"""Of English prose about four words in ten are among these; of lists of names and signatures far fewer."""


def natural_text(model: Model, n_sequences: int | None, length: int, seed: int = 0) -> Int[Tensor, "sequence pos"]:
    """Sequences of English prose, each from the beginning of a paragraph, as token ids.

    They come from docstrings of the standard library and of the packages that `interp` needs, from as many parts of
    them as there are sequences; no paragraph occurs twice. The same packages and seed give the same text.

    Costs a second or two once a process, for reading files.

    Args:
        model: its tokenizer makes the ids; a BOS stands first where that tokenizer adds one.
        n_sequences: rows; None: as many as there are.
        length: tokens a row.
        seed: which passages, and their order.

    Raises:
        ValueError: if the installed packages hold too little text, or the model has no tokenizer that reads prose.
    """
    rows: list[Tensor] = []
    for passage in _passages(length * _CHARACTERS_A_TOKEN, seed):
        if len(rows) == n_sequences:
            break
        tokens = _read(model, passage)
        if len(tokens) >= length:
            rows.append(tokens[:length])
    if len(rows) < (n_sequences or 0) or not rows:
        raise ValueError(
            f"the installed packages hold {len(rows)} sequences of {length} tokens; {n_sequences} were asked for: take "
            "fewer or shorter ones, or bring your own text"
        )
    return torch.stack(rows)


def _read(model: Model, passage: str) -> Int[Tensor, " pos"]:
    try:
        return model.to_tokens(passage)[0]
    except ValueError:
        raise
    except Exception as error:  # what a tokenizer of few words raises has no type of its own
        raise ValueError(
            f"the tokenizer of {model.name} cannot read English prose ({error}): give token ids of its own words"
        ) from error


def _passages(n_characters: int, seed: int) -> Iterator[str]:
    """Passages of at least so many characters: one from each folder in turn, then a second from each, and so on."""
    folders = list(_folders())
    random.Random(seed).shuffle(folders)
    seen: set[str] = set()
    waiting = [_cut(folder, n_characters, seen) for folder in folders]
    while waiting:
        left = []
        for passages in waiting:
            passage = next(passages, None)
            if passage is not None:
                yield passage
                left.append(passages)
        waiting = left


def _cut(folder: Path, n_characters: int, seen: set[str]) -> Iterator[str]:
    """The paragraphs of a folder, those seen elsewhere left out, joined into passages; a short rest is dropped."""
    held: list[str] = []
    for paragraph in _paragraphs(folder):
        if paragraph in seen:
            continue
        seen.add(paragraph)
        held.append(paragraph)
        if sum(map(len, held)) >= n_characters:
            yield "\n\n".join(held)
            held = []


@functools.cache
def _folders() -> tuple[Path, ...]:
    """Folders with Python files, in an order that does not depend on where packages are installed."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            roots.append(Path(spec.submodule_search_locations[0]))
    found = []
    for root in roots:
        for folder, inside, files in os.walk(root):
            inside[:] = sorted(set(inside) - _SKIPPED)
            if any(file.endswith(".py") for file in files):
                found.append(Path(folder))
    return tuple(found)


@functools.cache
def _paragraphs(folder: Path) -> tuple[str, ...]:
    """Paragraphs of prose in the triple-quoted strings of a folder's Python files, each once, in order."""
    found: dict[str, None] = {}
    for file in sorted(folder.glob("*.py")):
        for match in _QUOTED.finditer(file.read_text(encoding="utf-8", errors="replace")):
            if len(match[2]) < _MIN_CHARACTERS:
                continue
            # Lines of one indentation are a paragraph: a parameter's description stands apart from its name and type.
            for _, lines in itertools.groupby(inspect.cleandoc(match[2]).splitlines(), key=_indentation):
                paragraph = _prose("\n".join(lines))
                if paragraph:
                    found[paragraph] = None
    return tuple(found)


def _indentation(line: str) -> int:
    """Blanks before the text; -1 for an empty line."""
    return len(line) - len(line.lstrip()) if line.strip() else -1


def _prose(block: str) -> str:
    """A block of lines as one line of prose; "" if it is anything else."""
    if len(block) < _MIN_CHARACTERS or any(sign in block for sign in (">>>", " : ", "::", "://")):
        return ""
    text = " ".join(_ROLE.sub(r"\1", block).replace("`", "").split())
    if len(text) < _MIN_CHARACTERS or not _SENTENCES.fullmatch(text):
        return ""
    n_words = len(re.findall(r"\w+", text))
    return text if len(_COMMON.findall(text)) >= _COMMON_SHARE * n_words else ""
