"""From prompt pairs as text to a `Task`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from interp.metrics import metric_named
from interp.tasks.task import Task, check_aligned, padded_ids
from interp.tasks.vocabulary import answer_id, prompt_ids, token_position

if TYPE_CHECKING:
    from interp.model import Model

FIELDS = ("clean", "corrupted", "answer", "wrong", "images", "corrupted_images")


@dataclass(frozen=True)
class Pair:
    """One clean/corrupted pair as text."""

    clean: str
    """The prompt with the behaviour."""
    corrupted: str
    """Its minimal pair."""
    answers: tuple[str, ...]
    """Right continuations of the clean prompt, with their leading space."""
    wrong: tuple[str, ...] = ()
    """Wrong continuations."""
    marks: Mapping[str, int] = field(default_factory=dict)
    """Key positions: name -> how many characters of the clean prompt end with that token."""
    pictures: tuple[Any, ...] = ()
    """Pictures (PIL) of the clean prompt, in reading order."""
    corrupted_pictures: tuple[Any, ...] = ()
    """Pictures of the corrupted prompt."""


@dataclass(frozen=True)
class TokenPair:
    """One pair as tokens."""

    text: Pair
    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    answers: tuple[int, ...]
    wrong: tuple[int, ...]
    str_tokens: tuple[str, ...]
    corrupted_str_tokens: tuple[str, ...]
    positions: Mapping[str, int]


def from_pairs(
    model: Model,
    pairs: Sequence[Mapping[str, Any]],
    *,
    first_token: bool = False,
    metric: str = "logit_diff",
    name: str = "pairs",
    description: str = "",
) -> Task:
    """A task of your own prompt pairs.

    Args:
        model: whose tokenizer is used.
        pairs: mappings with `clean`, `corrupted`, `answer` and `wrong` (the logit difference needs it). Answers are
            text with their leading space (" Mary"), or lists of texts where several are right or wrong. For a model
            that sees, `images` are the pictures (PIL) of both prompts, and `corrupted_images` those of the corrupted
            one where they differ; the texts have the model's image token where a picture stands.
        first_token: compare the first token of answers that are several tokens.
        metric: the task's metric, a name in `interp.metrics.METRICS`.
        name: how results call the task.
        description: the behaviour in a sentence.

    Raises:
        ValueError: naming the pair: fields missing or of the wrong type, different token lengths, no difference, an
            answer of several tokens, or answers that begin with the same token.
    """
    labelled = [(f"pair {row}", pair) for row, pair in enumerate(pairs)]
    tokenised = tokenise_fields(model, labelled, first_token=first_token, metric=metric)
    return assemble(tokenised, name=name, metric=metric, description=description, corruption="as given")


def tokenise_fields(
    model: Model, labelled: Iterable[tuple[str, Mapping[str, Any]]], *, first_token: bool, metric: str
) -> list[TokenPair]:
    """Tokens of pairs given as (where it stands, fields).

    Raises:
        ValueError: beginning with where the pair stands.
    """
    metric_named(metric)
    tokenised = []
    for where, fields_of_pair in labelled:
        try:
            pair = pair_of_fields(fields_of_pair)
            if not pair.wrong and metric == "logit_diff":
                raise ValueError("field 'wrong' is missing; the logit difference needs it (metric='log_prob' does not)")
            tokenised.append(tokenise(model, pair, first_token=first_token))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return tokenised


def pair_of_fields(fields_of_pair: Mapping[str, Any]) -> Pair:
    """Read one pair from a mapping.

    Raises:
        ValueError: naming the field that is missing, unknown or not text.
    """
    unknown = sorted(set(fields_of_pair) - set(FIELDS))
    if unknown:
        raise ValueError(f"field {unknown[0]!r} is unknown; fields are {', '.join(FIELDS)}")
    texts = {name: _texts(name, fields_of_pair.get(name)) for name in ("clean", "corrupted", "answer", "wrong")}
    for name in ("clean", "corrupted", "answer"):
        if not texts[name]:
            raise ValueError(f"field {name!r} is missing or empty")
    for name in ("clean", "corrupted"):
        if not isinstance(fields_of_pair[name], str):
            raise ValueError(f"field {name!r} must be one text")
    pictures = tuple(fields_of_pair.get("images", ()))
    return Pair(
        clean=texts["clean"][0],
        corrupted=texts["corrupted"][0],
        answers=texts["answer"],
        wrong=texts["wrong"],
        pictures=pictures,
        corrupted_pictures=tuple(fields_of_pair.get("corrupted_images", pictures)),
    )


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """A field as a tuple of texts: none, one or several."""
    if value is None or value == "":
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(one, str) and one for one in values):
        raise ValueError(f"field {name!r} is {value!r}; it must be text, or a list of texts")
    return tuple(values)


def tokenise(model: Model, pair: Pair, *, first_token: bool = False) -> TokenPair:
    """Tokens, answer ids and key positions of one pair; "END" is added.

    Raises:
        ValueError: if the two prompts do not align, or the answers cannot be told apart by one token.
    """
    clean = prompt_ids(model, pair.clean, pair.pictures)
    corrupted = prompt_ids(model, pair.corrupted, pair.corrupted_pictures)
    str_tokens, corrupted_str_tokens = tuple(model.to_str_tokens(clean)), tuple(model.to_str_tokens(corrupted))
    check_aligned(clean, corrupted, str_tokens, corrupted_str_tokens)
    answers = [answer_id(model, pair.clean, answer, first_token=first_token) for answer in pair.answers]
    wrong = [answer_id(model, pair.clean, answer, first_token=first_token) for answer in pair.wrong]
    shared = next((one for one, token in zip(pair.answers, answers, strict=True) if token in wrong), None)
    if shared is not None:
        raise ValueError(f"the answer {shared!r} begins with the same token as a wrong one; nothing tells them apart")
    positions = {name: token_position(model, pair.clean, end) for name, end in pair.marks.items()}
    return TokenPair(
        text=pair,
        clean=clean,
        corrupted=corrupted,
        answers=tuple(dict.fromkeys(answers)),
        wrong=tuple(dict.fromkeys(wrong)),
        str_tokens=str_tokens,
        corrupted_str_tokens=corrupted_str_tokens,
        positions=positions | {"END": len(clean) - 1},
    )


def assemble(
    pairs: Sequence[TokenPair], *, name: str, metric: str, description: str, corruption: str, seed: int | None = None
) -> Task:
    """A task of tokenised pairs, all with the same key positions."""
    marks = pairs[0].positions if pairs else ()
    return Task(
        name=name,
        clean_ids=tuple(pair.clean for pair in pairs),
        corrupted_ids=tuple(pair.corrupted for pair in pairs),
        answers=padded_ids([pair.answers for pair in pairs]),
        wrong=padded_ids([pair.wrong for pair in pairs]),
        positions={mark: torch.tensor([pair.positions[mark] for pair in pairs]) for mark in marks},
        metric=metric,
        clean_text=tuple(pair.text.clean for pair in pairs),
        corrupted_text=tuple(pair.text.corrupted for pair in pairs),
        str_tokens=tuple(pair.str_tokens for pair in pairs),
        corrupted_str_tokens=tuple(pair.corrupted_str_tokens for pair in pairs),
        index=torch.arange(len(pairs)),
        description=description,
        corruption=corruption,
        seed=seed,
    )
