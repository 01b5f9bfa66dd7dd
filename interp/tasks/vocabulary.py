"""Which words are one token for a tokenizer, and which tokens an answer is made of after a given prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp.model import Model


def prompt_ids(model: Model, text: str, pictures: Sequence[Any] = ()) -> tuple[int, ...]:
    """Token ids of a prompt, with its pictures, whose last token is the one that predicts the answer.

    Raises:
        ValueError: for an empty prompt, and for a tokenizer that closes texts with a special token.
    """
    ids = tuple(model.to_tokens(text, images=pictures or None)[0].tolist())
    if not ids or not text:
        raise ValueError("a prompt is empty; it needs at least one token")
    closing = {model.tokenizer.eos_token_id, model.tokenizer.sep_token_id} - {None}
    if len(ids) > 1 and ids[-1] in closing and not text.endswith(model.to_str_tokens(ids[-1:])[0]):
        raise ValueError(
            f"this tokenizer ends {text!r} with {model.to_str_tokens(ids[-1:])[0]!r}; the answer is read at the last "
            "token, so turn that off in the tokenizer (add_eos_token=False)"
        )
    return ids


def continuation_ids(model: Model, prompt: str, answer: str) -> tuple[int, ...]:
    """Token ids of an answer as it follows the prompt; the answer by itself where the two would merge."""
    before = tuple(model.to_tokens(prompt)[0].tolist())
    together = tuple(model.to_tokens(prompt + answer)[0].tolist())
    if together[: len(before)] == before:
        return together[len(before) :]
    return tuple(model.tokenizer(answer, add_special_tokens=False)["input_ids"])


def answer_id(model: Model, prompt: str, answer: str, *, first_token: bool = False) -> int:
    """The token id of an answer after a prompt.

    Raises:
        ValueError: if the answer is several tokens and `first_token` is not set; the message shows them.
    """
    ids = continuation_ids(model, prompt, answer)
    if not ids:
        raise ValueError(f"the answer {answer!r} is no token")
    if len(ids) > 1 and not first_token:
        raise ValueError(
            f"the answer {answer!r} is {len(ids)} tokens, {model.to_str_tokens(ids)}; choose an answer of one token, "
            "or pass first_token=True to compare the first token of each answer"
        )
    return ids[0]


def one_token_words(model: Model, words: Iterable[str], *, kind: str, at_least: int = 1) -> list[str]:
    """Those words that are one token after a space, and of the same form wherever they stand.

    Args:
        model: whose tokenizer decides.
        words: candidates, without a space in front.
        kind: what they are, for the error: "names".
        at_least: how many the task needs.

    Raises:
        ValueError: if too few are left.
    """
    candidates = list(dict.fromkeys(words))
    kept = [word for word in candidates if len(continuation_ids(model, "See the", f" {word}")) == 1]
    if len(kept) < at_least:
        found = f" ({', '.join(kept)})" if kept else ""
        raise ValueError(
            f"this task needs {at_least} {kind} that are one token; the tokenizer of {model.name} has {len(kept)} of "
            f"the {len(candidates)} known ones{found}"
        )
    return kept


def token_position(model: Model, text: str, end: int) -> int:
    """Index of the token that ends with character `end` of a prompt (exclusive), BOS included.

    Raises:
        ValueError: if no token ends there.
    """
    ids = tuple(model.to_tokens(text)[0].tolist())
    before = tuple(model.to_tokens(text[:end])[0].tolist())
    if ids[: len(before)] != before:
        raise ValueError(f"no token of {text!r} ends after {text[:end]!r}: tokens {model.to_str_tokens(ids)}")
    return len(before) - 1
