"""The zoo's models by name: load one, draw its task, look up its circuit."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from interp.model import Model
from interp.tasks import Task
from interp.zoo import trained, wired, wired_duplicate
from interp.zoo.prompts import Behaviour, repeated_sequence
from interp.zoo.seeing import SEEING, load_seeing
from interp.zoo.words import LETTERS, SYMBOLS, word_tokenizer

Edges = frozenset[tuple[str, str]]

_EXCHANGED = "in turn: the last token becomes C; A and C are exchanged where they first stand; B and D are exchanged"


@dataclass(frozen=True)
class _Entry:
    """A model of the zoo."""

    build: Callable[[], Any]
    """Makes the transformers model: wired, or with random weights for the trained ones."""
    behaviour: Behaviour
    edges: Edges | None
    """None for trained models."""
    summary: str


def _induction(name: str, words: tuple[str, ...], *, length: int, successor: bool = False) -> Behaviour:
    answer = "the token after the one that followed its first occurrence" if successor else "what followed it"
    return Behaviour(
        name=name,
        words=words,
        draw=repeated_sequence(len(words), length=length, repeated=4, successor=successor),
        description=f"A sequence begins anew; of its last token's first occurrence, the answer is {answer}.",
        corruption=_EXCHANGED,
    )


_ENTRIES = {
    "induction": _Entry(
        wired.induction,
        _induction("induction", LETTERS, length=10),
        wired.INDUCTION_EDGES,
        "wired by hand: 2-layer attention-only GPT-2, previous-token head -> induction head, beside distractors",
    ),
    "duplicate": _Entry(
        wired_duplicate.duplicate,
        Behaviour(
            name="duplicate",
            words=wired_duplicate.WORDS,
            draw=wired_duplicate.draw_duplicate,
            description="Two names, one of which is repeated; the answer is the other one.",
            corruption="the names are exchanged, and the other one is repeated, at the next position",
        ),
        wired_duplicate.DUPLICATE_EDGES,
        "wired by hand: 3-layer GPT-2, duplicate-token head -> inhibition head -> mover head, beside distractors",
    ),
    "llama_induction": _Entry(
        wired.llama_induction,
        _induction("llama_induction", LETTERS, length=10, successor=True),
        wired.LLAMA_EDGES,
        "wired by hand: 2-layer Llama (RMSNorm, RoPE, GQA), induction head -> gated MLP, beside distractors",
    ),
    "induction_2l": _Entry(
        trained.induction_2l,
        _induction("induction_2l", SYMBOLS, length=12),
        None,
        "trained: 2-layer attention-only Llama on repeated random sequences",
    ),
    "ioi_small": _Entry(
        trained.ioi_small,
        Behaviour(
            name="ioi_small",
            words=trained.IOI_WORDS,
            draw=trained.draw_ioi,
            description="Which of two names was not repeated? The names of a prompt never met in training.",
            corruption="the second S is replaced by IO, so that S becomes the right answer",
        ),
        None,
        "trained: 3-layer Llama on indirect-object identification over a small vocabulary",
    ),
}

MODELS: dict[str, str] = {name: entry.summary for name, entry in _ENTRIES.items()} | SEEING
"""Names of the models, each with a line on what it is."""


def load(name: str) -> Model:
    """A small model that ships with the package, in float32 on the CPU, with a tokenizer of whole words.

    Hand-wired models are made on the spot, the same ones every time; trained ones are read from safetensors.

    Args:
        name: one of `MODELS`.

    Raises:
        ValueError: for another name.
    """
    if name in SEEING:
        return load_seeing(name)
    entry = _entry(name)
    with torch.random.fork_rng(devices=[]):  # architectures draw weights that are overwritten at once
        hf = entry.build()
    if entry.edges is None:
        hf = trained.with_weights(hf, name)
    return Model(hf.eval(), word_tokenizer(entry.behaviour.words), name=f"zoo:{name}")


def task(name: str, n: int = 32, seed: int = 0) -> Task:
    """The task that a model was wired or trained for, on which its circuit is known.

    Key positions: A, B, C, D, END for induction (A B is the pair that the answer depends on, C D the one that the
    corrupted answer comes from); IO, S1, S2, S2+1, END for duplicate; IO, S1, S2, END for ioi_small. Metric: logit
    difference.

    Args:
        name: one of `MODELS`.
        n: prompt pairs, drawn independently.
        seed: the same seed gives the same task.

    Raises:
        ValueError: for another name, less than one prompt, or a model that sees (`picture_task` is for these).
    """
    if name in SEEING:
        raise ValueError(f"{name!r} sees: interp.zoo.picture_task(model) shows it the pictures of its task")
    return _entry(name).behaviour.as_task(n, seed)


def edges(name: str) -> Edges:
    """The circuit of a hand-wired model on its task, as (writer, reader) names (`interp.patching.edges`).

    An edge is in the circuit if and only if corrupting it alone changes the metric: in a clean run, its reader sees the
    writer's output of the corrupted run and everything after it is recomputed. Over a task of six prompts or more,
    these edges take more than a fifth of the gap between clean and corrupted each, all others less than 0.001 of it:
    what is left is what they change in the length of the stream, by which norms divide. So an edge is
    out, too, if it carries the same in both runs: the previous-token head attends by position, and its query and key
    are no part of the circuit.

    Args:
        name: a hand-wired one of `MODELS`.

    Raises:
        ValueError: for a trained model, or another name.
    """
    entry = _entry(name)
    if entry.edges is None:
        wired_names = ", ".join(other for other, one in _ENTRIES.items() if one.edges is not None)
        raise ValueError(
            f"{name!r} is a trained model: its circuit is not known for certain; it is for the hand-wired {wired_names}"
        )
    return entry.edges


def _entry(name: str) -> _Entry:
    if name in _ENTRIES:
        return _ENTRIES[name]
    near = difflib.get_close_matches(name, MODELS, n=2)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(MODELS)}"
    raise ValueError(f"there is no model {name!r} in the zoo; {hint}")
