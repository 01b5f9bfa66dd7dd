"""Train `ioi_small`: sentences with two names, the last word of which is the name that was not repeated.

Every word is predicted, the last one with the weight of a whole sentence more. A fifth of the pairs of names is
held out.

>>> python -m interp.zoo.training.train_ioi --out interp/zoo/weights/ioi_small.safetensors
"""

from __future__ import annotations

import random
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from interp.zoo.trained import draw_ioi, ioi_small
from interp.zoo.training.loop import arguments, save, train

BATCH = 128


def sentences(rng: random.Random, *, held_out: bool, n: int = BATCH) -> Int[Tensor, "sentence pos"]:
    """Sentences with their last word."""
    prompts = [draw_ioi(rng, number, held_out=held_out) for number in range(n)]
    return torch.tensor([[*prompt.clean, prompt.answer] for prompt in prompts])


def sentence_loss(hf: Any, tokens: Int[Tensor, "sentence pos"]) -> Tensor:
    """Cross-entropy of the last word plus the mean over all words."""
    logits, right = hf(tokens[:, :-1]).logits, tokens[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), right, reduction="none")
    return losses[:, -1].mean() + losses.mean()


@torch.no_grad()
def ioi_accuracy(hf: Any, *, seed: int, n: int = 2000) -> float:
    """Share of held-out sentences whose last word is the model's first choice."""
    tokens = sentences(random.Random(seed), held_out=True, n=n)
    return float((hf(tokens[:, :-1]).logits[:, -1].argmax(dim=-1) == tokens[:, -1]).float().mean())


def main() -> None:
    """Train, measure on held-out pairs of names, and save."""
    options = arguments("Train the zoo's small IOI model.", steps=1000)
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)

    def loss(hf: Any) -> Tensor:
        return sentence_loss(hf, sentences(rng, held_out=False))

    hf = ioi_small()
    train(hf, loss, steps=options.steps, learning_rate=2e-3)
    save(hf, options.out, seed=options.seed, steps=options.steps, accuracy=ioi_accuracy(hf, seed=options.seed + 1))


if __name__ == "__main__":
    main()
