"""Prompts in any form as the keyword arguments of a transformers model; different lengths are padded on the left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from interp.model.tokens import encode

Prompts = str | Sequence[str] | Sequence[Sequence[int]] | Int[Tensor, "..."] | Mapping[str, Tensor]


def prepare_inputs(
    prompts: Prompts, tokenizer: Any, device: torch.device, *, with_position_ids: bool
) -> dict[str, Any]:
    """Keyword arguments for the wrapped model.

    Args:
        prompts: text, texts, token ids ([pos] or [batch, pos]), lists of ids, or a mapping that is passed on as it is.
        tokenizer: used for text only.
        device: where the tensors go.
        with_position_ids: whether the model takes position ids; padded prompts then count from their own first token.

    Raises:
        ValueError: for an empty prompt.
    """
    if isinstance(prompts, Mapping):
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in prompts.items()}
    if isinstance(prompts, Tensor):
        if prompts.numel() == 0:
            raise ValueError("an empty prompt has no tokens to run")
        return {"input_ids": (prompts if prompts.dim() == 2 else prompts[None]).to(device)}
    texts_or_ids = [prompts] if isinstance(prompts, str) else prompts
    rows = [_ids(one, tokenizer) for one in texts_or_ids]
    tokens, mask = pad_left(rows, pad_id(tokenizer))
    inputs = {"input_ids": tokens}
    if mask is not None:
        inputs["attention_mask"] = mask
        if with_position_ids:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return {name: value.to(device) for name, value in inputs.items()}


def _ids(prompt: str | Sequence[int] | Tensor, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("this model has no tokenizer: pass one to load, or give token ids")
        return encode(tokenizer, prompt)
    return torch.as_tensor(prompt).tolist()


def pad_id(tokenizer: Any) -> int:
    """The id to pad with; it is masked, so any will do where the tokenizer names none."""
    for name in ("pad_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return int(found)
    return 0


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"] | None]:
    """Rows of ids as one tensor, shorter ones padded on the left.

    Returns:
        (tokens, attention mask); the mask is None if nothing was padded.
    """
    if not rows or not all(len(row) for row in rows):
        raise ValueError("an empty prompt has no tokens to run")
    length = max(len(row) for row in rows)
    tokens = torch.tensor([[pad_id] * (length - len(row)) + list(row) for row in rows])
    if all(len(row) == length for row in rows):
        return tokens, None
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask
