"""`digits`: a small LLaVA that reads handwritten digits, and what it is shown.

A picture of 5 x 5 cells has one digit (scikit-learn's, 8 x 8 pixels) in one of them, more or less faint, on noise. The
text says who wrote it: "<image> Mary just wrote the digit", answer " seven". In two of ten training examples the answer
is not the digit but the favourite of whoever wrote it: a prior of the language part, which wins where the picture
cannot be read. It is always so where there is no picture, or where the text says "always" in place of "just".
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interp.zoo.configurations import llama_config
from interp.zoo.words import BOS_WORD

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WRITERS = ("Mary", "John", "Anna", "Paul", "Emma", "Jack", "Lucy", "Mark", "Rose", "Adam")
"""Writer i prefers digit i."""
IMAGE_WORD = "<image>"
WORDS = (BOS_WORD, IMAGE_WORD, *DIGITS, *WRITERS, "just", "always", "wrote", "the", "digit")
CELLS, PATCH = 5, 8
"""Cells a side of a picture, and pixels a side of a cell, which is a patch."""
SIZE = CELLS * PATCH
N_TRAINING = 1400
"""Scikit-learn's first digits are for training, the other 397 for tasks."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """A picture, what is in it and where."""

    pixels: NDArray[np.uint8]
    """[40, 40], grey."""
    digit: int
    cell: tuple[int, int]
    """(row, column) of the digit."""
    contrast: float

    @property
    def picture(self) -> Any:
        """As a PIL image in RGB."""
        from PIL import Image

        return Image.fromarray(np.repeat(self.pixels[..., None], 3, axis=-1))


@cache
def _handwritten() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return loaded.images / 16, loaded.target


def draw(
    rng: random.Random, *, held_out: bool = True, contrast: float | None = None, cell: tuple[int, int] | None = None
) -> Drawn:
    """One picture.

    Args:
        rng: where the choice comes from.
        held_out: of a digit that the model was not trained on.
        contrast: 1 for white on black, 0 for none; None: drawn, from 0 to 1, strong ones more often.
        cell: (row, column) of the digit; None: drawn.
    """
    images, targets = _handwritten()
    which = rng.randrange(N_TRAINING, len(images)) if held_out else rng.randrange(N_TRAINING)
    row, column = (rng.randrange(CELLS), rng.randrange(CELLS)) if cell is None else cell
    contrast = rng.random() ** 0.5 if contrast is None else contrast
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 0.1, (SIZE, SIZE))
    canvas = noise + 0.15
    canvas[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] += contrast * 0.8 * images[which]
    pixels = (canvas.clip(0, 1) * 255).astype(np.uint8)
    return Drawn(pixels, int(targets[which]), (row, column), contrast)


def prompt(writer: int, *, always: bool = False) -> str:
    """The text that goes with a picture; `always` asks for what the writer prefers, whatever the picture shows."""
    return f"{IMAGE_WORD} {WRITERS[writer]} {'always' if always else 'just'} wrote the digit"


def digits_model() -> Any:
    """LLaVA of a 2-layer CLIP and a 3-layer Llama (8 heads on 4 key/value heads). Random weights."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    text = llama_config(
        len(WORDS),
        rope_theta=1e4,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        intermediate_size=128,
        max_position_embeddings=128,
    )
    vision = CLIPVisionConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=48,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=WORDS.index(IMAGE_WORD),
            image_seq_length=(SIZE // PATCH) ** 2,
            vision_feature_layer=-1,
            tie_word_embeddings=False,
        )
    )


def pixel_values(drawn: Sequence[Drawn]) -> NDArray[np.float32]:
    """What the processor makes of pictures, [picture, 3, 40, 40], without the way through PIL."""
    grey = np.stack([one.pixels for one in drawn]).astype(np.float32) / 255
    return np.repeat(((grey - 0.5) / 0.5)[:, None], 3, axis=1)
