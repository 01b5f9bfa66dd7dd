"""Train `digits`: a small LLaVA, from scratch, on pictures of one digit and the name of who wrote it.

A tenth of the batches have no pictures, and there the answer is the writer's favourite; also where the text says
"always"; else it is the digit in eight of ten examples. Nothing but the answer is predicted.

>>> python -m interp.zoo.training.train_digits --out interp/zoo/weights/digits.safetensors
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from interp.zoo import digits
from interp.zoo.training.loop import arguments, save, train

BATCH, SHARE_OF_THE_PRIOR, ALWAYS, TEXT_ONLY = 64, 0.2, 0.25, 0.1
N_PATCHES = (digits.SIZE // digits.PATCH) ** 2


def examples(
    rng: random.Random, *, held_out: bool, n: int, contrast: float | None = None, share_always: float = 0.0
) -> dict[str, Tensor]:
    """Inputs of the model with a picture each, the `digit` in it, the `writer`, and whether the text says "always"."""
    drawn = [digits.draw(rng, held_out=held_out, contrast=contrast) for _ in range(n)]
    writers = [rng.randrange(len(digits.WRITERS)) for _ in drawn]
    always = [rng.random() < share_always for _ in drawn]
    rows = []
    for writer, asked in zip(writers, always, strict=True):
        words = [digits.BOS_WORD, *digits.prompt(writer, always=asked).split()]
        ids = [digits.WORDS.index(word) for word in words]
        rows.append([ids[0], *[ids[1]] * N_PATCHES, *ids[2:]])
    return {
        "input_ids": torch.tensor(rows),
        "pixel_values": torch.from_numpy(digits.pixel_values(drawn)),
        "digit": torch.tensor([one.digit for one in drawn]),
        "writer": torch.tensor(writers),
        "always": torch.tensor(always),
    }


def answer_logits(hf: Any, batch: dict[str, Tensor], *, seeing: bool) -> Tensor:
    """Logits of the ten digits, [example, digit], with the picture or with its positions left out."""
    tokens = batch["input_ids"]
    inputs = {"input_ids": torch.cat([tokens[:, :1], tokens[:, 1 + N_PATCHES :]], dim=1)}
    if seeing:
        inputs = {"input_ids": tokens, "pixel_values": batch["pixel_values"]}
    return hf(**inputs, logits_to_keep=1).logits[:, -1]


def answer_loss(hf: Any, rng: random.Random) -> Tensor:
    """Cross-entropy of the answer, over all words."""
    batch = examples(rng, held_out=False, n=BATCH, share_always=ALWAYS)
    seeing = rng.random() >= TEXT_ONLY
    by_prior = torch.tensor([rng.random() < SHARE_OF_THE_PRIOR or not seeing for _ in range(BATCH)])
    right = torch.where(by_prior | batch["always"], batch["writer"], batch["digit"]) + digits.WORDS.index(
        digits.DIGITS[0]
    )
    return torch.nn.functional.cross_entropy(answer_logits(hf, batch, seeing=seeing), right)


@torch.no_grad()
def initialise(hf: Any) -> None:
    """Matrices that keep activations of order 1: with transformers' own, a model of this size never reads pixels."""
    for parameter in hf.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.7 * parameter[0].numel() ** -0.5)


@torch.no_grad()
def accuracy(hf: Any, *, seed: int, n: int = 1000, contrast: float | None = 1.0) -> float:
    """Share of held-out pictures whose digit is the model's first choice."""
    batch = examples(random.Random(seed), held_out=True, n=n, contrast=contrast)
    chosen = answer_logits(hf, batch, seeing=True).argmax(-1) - digits.WORDS.index(digits.DIGITS[0])
    return float((chosen == batch["digit"]).float().mean())


def main() -> None:
    """Train, measure on held-out digits, and save."""
    options = arguments("Train the zoo's small model that sees.", steps=1500)
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    hf = digits.digits_model()
    initialise(hf)
    train(hf, lambda model: answer_loss(model, rng), steps=options.steps, learning_rate=2e-3)
    save(hf, options.out, seed=options.seed, steps=options.steps, accuracy=accuracy(hf, seed=options.seed + 1))


if __name__ == "__main__":
    main()
