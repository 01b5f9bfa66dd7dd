"""A task made of bare token ids, for models without a tokenizer."""

from __future__ import annotations

import torch

from interp.tasks import Task


def task_of_tokens(clean, corrupted):
    """Prompts [n, pos] whose right answer is token 5 and whose wrong answer is token 9."""
    n = len(clean)
    words = tuple(tuple(str(token) for token in row) for row in clean.tolist())
    return Task(
        name="tokens",
        clean_ids=tuple(map(tuple, clean.tolist())),
        corrupted_ids=tuple(map(tuple, corrupted.tolist())),
        answers=torch.full((n, 1), 5),
        wrong=torch.full((n, 1), 9),
        positions={"END": torch.full((n,), clean.shape[1] - 1)},
        metric="logit_diff",
        clean_text=tuple(" ".join(row) for row in words),
        corrupted_text=tuple(" ".join(map(str, row)) for row in corrupted.tolist()),
        str_tokens=words,
        corrupted_str_tokens=tuple(tuple(map(str, row)) for row in corrupted.tolist()),
        index=torch.arange(n),
    )
