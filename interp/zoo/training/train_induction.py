"""Train `induction_2l`: sequences of random tokens that begin anew, predicted from where they do.

Random tokens of any number come first and the sequence has any length, so that no fixed distance back is the answer;
tokens may come several times, so that it is not what has not yet been repeated either.

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
"""Tokens of the sequence that is repeated."""
LONGEST_PREFIX = 15
"""Random tokens in front of it."""


def repeated_batch(
    generator: torch.Generator, *, prefix: int, length: int, distinct: bool = False, batch: int = BATCH
) -> Int[Tensor, "batch pos"]:
    """A BOS, random tokens, and a random sequence twice; `distinct`: no token stands twice but for the repetition."""
    if distinct:
        tokens = torch.rand(batch, len(SYMBOLS) - 1, generator=generator).argsort(dim=1)[:, : prefix + length] + 1
    else:
        tokens = torch.randint(1, len(SYMBOLS), (batch, prefix + length), generator=generator)
    return torch.cat([torch.full((batch, 1), BOS), tokens, tokens[:, prefix:]], dim=1)


def in_repetition(
    hf: Any, tokens: Int[Tensor, "batch pos"], *, length: int
) -> tuple[Float[Tensor, "row token"], Int[Tensor, " row"]]:
    """Logits and right tokens from the second token of the repetition on: the first one could be any."""
    return hf(tokens).logits[:, -length:-1].flatten(0, 1), tokens[:, 1 - length :].flatten()


@torch.no_grad()
def induction_accuracy(hf: Any, *, seed: int) -> float:
    """Share of the repeated tokens that are the model's first choice, over all lengths, where tokens are distinct."""
    generator = torch.Generator().manual_seed(seed)
    right = []
    for length in range(SHORTEST, LONGEST + 1):
        tokens = repeated_batch(generator, prefix=length % (LONGEST_PREFIX + 1), length=length, distinct=True)
        logits, expected = in_repetition(hf, tokens, length=length)
        right.append(logits.argmax(dim=-1) == expected)
    return float(torch.cat(right).float().mean())


def main() -> None:
    """Train, measure on sequences of another seed, and save."""
    options = arguments("Train the zoo's 2-layer attention-only induction model.", steps=1000)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)

    def loss(hf: Any) -> Tensor:
        length = int(torch.randint(SHORTEST, LONGEST + 1, (), generator=generator))
        prefix = int(torch.randint(LONGEST_PREFIX + 1, (), generator=generator))
        tokens = repeated_batch(generator, prefix=prefix, length=length)
        return torch.nn.functional.cross_entropy(*in_repetition(hf, tokens, length=length))

    hf = induction_2l()
    for block in hf.model.layers:
        block.mlp.requires_grad_(False)
    train(hf, loss, steps=options.steps, learning_rate=3e-3)
    accuracy = induction_accuracy(hf, seed=options.seed + 1)
    save(hf, options.out, seed=options.seed, steps=options.steps, accuracy=accuracy)


if __name__ == "__main__":
    main()
