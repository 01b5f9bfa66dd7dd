"""Text to tokens and back, as the model's own tokenizer does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


def encode(tokenizer: Any, text: str, *, prepend_bos: bool | None = None) -> list[int]:
    """Token ids of one text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: the text.
        prepend_bos: None leaves the choice to the tokenizer; True makes sure that there is one (never two) BOS in
            front; False that there is none.
    """
    return with_bos(tokenizer, list(tokenizer(text)["input_ids"]), prepend_bos)


def with_bos(tokenizer: Any, ids: list[int], prepend_bos: bool | None) -> list[int]:
    """Token ids of one text with or without a BOS in front, as `encode` says."""
    bos = tokenizer.bos_token_id
    if prepend_bos is None:
        return ids
    if bos is None:
        if prepend_bos:
            raise ValueError("this tokenizer has no BOS token; leave prepend_bos out")
        return ids
    starts_with_bos = bool(ids) and ids[0] == bos
    if prepend_bos and not starts_with_bos:
        return [bos, *ids]
    if not prepend_bos and starts_with_bos:
        return ids[1:]
    return ids


def stacked(rows: Sequence[Sequence[int]], device: torch.device) -> Int[Tensor, "batch pos"]:
    """Rows of token ids as one tensor.

    Raises:
        ValueError: if they differ in length: padded ids would be read as tokens later.
    """
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            f"the texts have {', '.join(map(str, lengths))} tokens; give them to the model as text (it pads "
            "and masks them), or tokenise each length by itself"
        )
    return torch.tensor(rows, device=device)


def ids_of_one(prompt: Sequence[int] | Int[Tensor, "..."]) -> list[int]:
    """Token ids of one prompt, [pos] or [1, pos].

    Raises:
        ValueError: if it is several.
    """
    ids = torch.as_tensor(prompt)
    if ids.dim() == 2 and len(ids) != 1:
        raise ValueError(f"to_str_tokens takes one prompt; got {len(ids)}")
    return [int(one) for one in ids.reshape(-1).tolist()]


def decode_each(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token by itself, leading spaces visible as spaces: `[" Mary", " went"]`."""
    return [tokenizer.decode([int(one)], clean_up_tokenization_spaces=False) for one in ids]


def single_token(tokenizer: Any, text: str) -> int:
    """The id of a text that is one token.

    Raises:
        ValueError: if it is several; the message shows them.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(ids) != 1:
        raise ValueError(f"{text!r} is {len(ids)} tokens: {decode_each(tokenizer, ids)}")
    return int(ids[0])
