"""The zoo's models that see, their pictures and their tasks."""

from __future__ import annotations

import random
from typing import Any

import torch

from interp.model import Model
from interp.tasks import Task
from interp.tasks.pairs import from_pairs
from interp.zoo import digits, wired_vision
from interp.zoo.trained import with_weights
from interp.zoo.words import word_tokenizer

SEEING = {
    "colours": "wired by hand: LLaVA that names the colour of a cell, with image, prior and outlier heads and a sink",
    "digits": "trained: LLaVA that reads a handwritten digit, with a prior for each writer",
}


def load_seeing(name: str) -> Model:
    """One of `SEEING`, with tokenizer and processor."""
    maker: Any = wired_vision if name == "colours" else digits
    with torch.random.fork_rng(devices=[]):  # architectures draw weights that are overwritten at once
        hf = wired_vision.colours_model() if name == "colours" else with_weights(digits.digits_model(), name)
    tokenizer = word_tokenizer(maker.WORDS, whole=(maker.IMAGE_WORD,))
    return Model(hf.eval(), tokenizer, processor=_processor(tokenizer, maker.PATCH), name=f"zoo:{name}")


def _processor(tokenizer: Any, patch: int) -> Any:
    """Pixels from -1 to 1 as they are, and a place for each patch."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    half = [0.5, 0.5, 0.5]
    pixels = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, image_mean=half, image_std=half)
    return LlavaProcessor(
        pixels, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def picture_task(model: Model, n: int = 32, seed: int = 0) -> Task:
    """The task of a zoo model that sees: the same question about two pictures.

    For "digits", clean and corrupted picture show another digit in the same cell, at full contrast; for "colours", the
    cell that is asked for has another colour. Neither is what the name in the prompt prefers.

    Args:
        model: `load("digits")` or `load("colours")`; it is shown the pictures.
        n: prompt pairs, drawn independently.
        seed: the same seed gives the same task.

    Raises:
        ValueError: for another model, or less than one prompt.
    """
    if model.name not in {f"zoo:{name}" for name in SEEING}:
        raise ValueError(f"{model.name} is no zoo model that sees: load one of {', '.join(SEEING)}")
    if n < 1:
        raise ValueError(f"n={n}; a task has at least one prompt pair")
    rng = random.Random(seed)
    draw = _colour_pair if model.name == "zoo:colours" else _digit_pair
    return from_pairs(
        model,
        [draw(rng) for _ in range(n)],
        name=model.name.removeprefix("zoo:"),
        description="What does the picture show? The name in the prompt prefers another answer.",
    )


def _colour_pair(rng: random.Random) -> dict[str, Any]:
    cell = rng.choice([one for one in range(wired_vision.N_CELLS) if one != wired_vision.SINK_CELL])
    right, wrong, preferred = rng.sample(wired_vision.COLOURS, 3)
    clean = [rng.choice(wired_vision.COLOURS) for _ in range(wired_vision.N_CELLS)]
    clean[cell] = right
    corrupted = [*clean[:cell], wrong, *clean[cell + 1 :]]
    text = wired_vision.prompt(wired_vision.NAMES[wired_vision.COLOURS.index(preferred)], cell)
    return {
        "clean": text,
        "corrupted": text,
        "images": [wired_vision.picture(clean)],
        "corrupted_images": [wired_vision.picture(corrupted)],
        "answer": f" {right}",
        "wrong": f" {wrong}",
    }


def _digit_pair(rng: random.Random) -> dict[str, Any]:
    clean = digits.draw(rng, contrast=1.0)
    while True:
        corrupted = digits.draw(rng, contrast=1.0, cell=clean.cell)
        if corrupted.digit != clean.digit:
            break
    writer = rng.choice([one for one in range(len(digits.WRITERS)) if one not in (clean.digit, corrupted.digit)])
    return {
        "clean": digits.prompt(writer),
        "corrupted": digits.prompt(writer),
        "images": [clean.picture],
        "corrupted_images": [corrupted.picture],
        "answer": f" {digits.DIGITS[clean.digit]}",
        "wrong": f" {digits.DIGITS[corrupted.digit]}",
    }
