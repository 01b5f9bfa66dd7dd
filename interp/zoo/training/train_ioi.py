"""Train `ioi_small`: sentences with two names, the last word of which is the name that was not repeated.

Every word is predicted, the last one with the weight of all others together. A fifth of the pairs of names is held out.

>>> python -m interp.zoo.training.train_ioi --out interp/zoo/weights/ioi_small.safetensors
"""

from __future__ import annotations

import random
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from interp.zoo.prompts import Prompt
from interp.zoo.trained import draw_ioi, ioi_small
from interp.zoo.training.loop import arguments, save, train

BATCH = 128


def sentence_batches(rng: random.Random, *, held_out: bool, n: int = BATCH) -> list[Tensor]:
    """Sentences with their last word, one tensor a length."""
    prompts = sorted((draw_ioi(rng, held_out=held_out) for _ in range(n)), key=_length)
    return [
        torch.tensor([[*prompt.clean, prompt.answer] for prompt in group]) for _, group in groupby(prompts, key=_length)
    ]


def _length(prompt: Prompt) -> int:
    return len(prompt.clean)


def sentence_loss(hf: Any, sentences: Tensor) -> Tensor:
    """Cross-entropy of the last word plus the mean over all words."""
    logits, right = hf(sentences[:, :-1]).logits, sentences[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), right, reduction="none")
    return losses[:, -1].mean() + losses.mean()


def ioi_accuracy(hf: Any, *, seed: int, n: int = 2000) -> float:
    """Share of held-out sentences whose last word is the model's first choice."""
    right = []
    with torch.no_grad():
        for sentences in sentence_batches(random.Random(seed), held_out=True, n=n):
            right.append(hf(sentences[:, :-1]).logits[:, -1].argmax(dim=-1) == sentences[:, -1])
    return float(torch.cat(right).float().mean())


def main() -> None:
    """Train, measure on held-out pairs of names, and save."""
    options = arguments("Train the zoo's small IOI model.", steps=2000)
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)

    def loss(hf: Any) -> Tensor:
        batches = sentence_batches(rng, held_out=False)
        return torch.stack([len(batch) / BATCH * sentence_loss(hf, batch) for batch in batches]).sum()

    hf = train(ioi_small(), loss, steps=options.steps, learning_rate=2e-3)
    save(hf, options.out, seed=options.seed, steps=options.steps, accuracy=ioi_accuracy(hf, seed=options.seed + 1))


if __name__ == "__main__":
    main()
