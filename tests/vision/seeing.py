"""Tiny random models that see, with a tokenizer and a processor, as users would load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import transformers as hf
from PIL import Image as PIL
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from interp import Model
from tests.model.families import FAMILIES
from tests.model.family import IMAGE_SIZE, IMAGE_TOKEN, PATCH

SEEING = ("llava", "paligemma", "qwen2_vl")
WORDS = ("what", "digit", "is", "this", "a", "cat", "dog", "red", "blue", ":")


def tokenizer() -> Any:
    """Whole words; the image token has the id that the tiny models give it."""
    special = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|vision_start|>": 3, "<|video_pad|>": 4}
    words = {word: 10 + number for number, word in enumerate(WORDS)}
    fill = {f"w{number}": number for number in range(61) if number not in {*special.values(), *words.values(), 60}}
    whole = Tokenizer(models.WordLevel({**special, **words, **fill, "<image>": IMAGE_TOKEN}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=whole,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=["<image>"],
    )


def processor(name: str) -> Any:
    """As a checkpoint of the family would bring it; for Qwen2-VL the image processor, since the rest reads video."""
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if name == "llava":
        pixels = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=square)
        return hf.LlavaProcessor(
            pixels,
            tokenizer(),
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    if name == "paligemma":
        pixels = SiglipImageProcessorPil(size=square)
        pixels.image_seq_length = (IMAGE_SIZE // PATCH) ** 2
        return hf.PaliGemmaProcessor(pixels, tokenizer())
    return Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, min_pixels=256, max_pixels=256)


def seeing_model(name: str, implementation: str = "eager") -> Model:
    """One of `SEEING`, with its processor."""
    return Model(FAMILIES[name].make_model(implementation), tokenizer(), processor=processor(name), name=f"tiny {name}")


def picture(seed: int, size: int = 16) -> PIL.Image:
    """A small picture of noise."""
    return PIL.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


def saved(name: str, folder: Path) -> Path:
    """The model as a checkpoint folder."""
    model = seeing_model(name)
    model.hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder
