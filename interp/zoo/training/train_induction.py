"""Train `induction_2l`: sequences of random tokens that begin anew, predicted from where they do.

The repetition starts somewhere else in every batch, so that no fixed distance back is the answer.

>>> python -m interp.zoo.training.train_induction --out interp/zoo/weights/induction_2l.safetensors
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.zoo.trained import induction_2l
from interp.zoo.training.loop import arguments, save, train
from interp.zoo.words import BOS, SYMBOLS

BATCH = 64
SHORTEST, LONGEST = 8, 24
"""Tokens before the repetition."""


def repeated_batch(generator: torch.Generator, *, length: int, batch: int = BATCH) -> Int[Tensor, "batch pos"]:
    """A BOS and random distinct tokens, twice."""
    tokens = torch.rand(batch, len(SYMBOLS) - 1, generator=generator).argsort(dim=1)[:, :length] + 1
    return torch.cat([torch.full((batch, 1), BOS), tokens, tokens], dim=1)


def second_half(hf: Any, tokens: Int[Tensor, "batch pos"]) -> tuple[Float[Tensor, "row token"], Int[Tensor, " row"]]:
    """Logits and right tokens wherever the repetition tells what comes next."""
    length = (tokens.shape[1] - 1) // 2
    logits = hf(tokens).logits[:, length + 1 : -1]
    return logits.flatten(0, 1), tokens[:, length + 2 :].flatten()


@torch.no_grad()
def induction_accuracy(hf: Any, *, seed: int) -> float:
    """Share of the repeated tokens that are the model's first choice, over all lengths."""
    generator = torch.Generator().manual_seed(seed)
    right = []
    for length in range(SHORTEST, LONGEST + 1):
        logits, tokens = second_half(hf, repeated_batch(generator, length=length))
        right.append(logits.argmax(dim=-1) == tokens)
    return float(torch.cat(right).float().mean())


def main() -> None:
    """Train, measure on sequences of another seed, and save."""
    options = arguments("Train the zoo's 2-layer attention-only induction model.", steps=1000)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)

    def loss(hf: Any) -> Tensor:
        length = int(torch.randint(SHORTEST, LONGEST + 1, (), generator=generator))
        return torch.nn.functional.cross_entropy(*second_half(hf, repeated_batch(generator, length=length)))

    hf = induction_2l()
    for block in hf.transformer.h:
        block.mlp.requires_grad_(False)
    train(hf, loss, steps=options.steps, learning_rate=3e-3)
    accuracy = induction_accuracy(hf, seed=options.seed + 1)
    save(hf, options.out, seed=options.seed, steps=options.steps, accuracy=accuracy)


if __name__ == "__main__":
    main()
