"""Text with pictures to token ids: the model's processor makes pixels and places, its images get ids of their own."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, ProcessorMixin

from interp.model.images import Image, ImageBook

logger = logging.getLogger(__name__)


def takes_pictures(hf: Any) -> bool:
    """Whether a transformers model takes pixels."""
    return "pixel_values" in inspect.signature(hf.forward).parameters


def read_processor(source: str, options: Mapping[str, Any]) -> Any:
    """The processor of a checkpoint, or its image processor alone; None if it comes without one.

    Some processors insist on reading video, which needs torchvision; where that is missing, the image processor does
    for pictures.

    Args:
        source: folder or hub id.
        options: `revision` and the like.
    """
    try:
        processor = AutoProcessor.from_pretrained(source, **options)
        if isinstance(processor, ProcessorMixin):
            return processor
    except (ImportError, OSError, ValueError) as error:
        logger.info("%s: no processor of text and pictures: %s", source, str(error).strip().split("\n")[0])
    try:
        return AutoImageProcessor.from_pretrained(source, **options)
    except (ImportError, OSError, ValueError) as error:
        logger.info("%s comes without an image processor: %s", source, str(error).strip().split("\n")[0])
        return None


def encode_with_pictures(
    processor: Any, tokenizer: Any, images: ImageBook, text: str, pictures: Sequence[Any]
) -> list[int]:
    """Token ids of one text with pictures, each piece of a picture as the id of its image.

    Args:
        processor: the model's processor; or its image processor alone, and then the text has the model's image token
            once for each picture, where the picture stands.
        tokenizer: the model's tokenizer.
        images: where the pictures are kept.
        text: the prompt.
        pictures: PIL images or arrays, in reading order; one at least.

    Raises:
        ValueError: if the model has no processor, or the text has not one place for each picture.
    """
    if processor is None:
        raise ValueError("this model has no processor for pictures: pass one to load (processor=...)")
    shown = [images.add(_pixels(processor, picture), picture=picture) for picture in pictures]
    token_id = shown[0].model_token
    token = tokenizer.convert_ids_to_tokens(token_id)
    n_places = text.count(token)
    if n_places != len(pictures):
        raise ValueError(
            f"the text has {n_places} places for an image ({token!r}) and {len(pictures)} pictures: {text!r}"
        )
    if isinstance(processor, ProcessorMixin):
        ids = list(processor(text=[text], images=list(pictures))["input_ids"][0])
    else:
        ids = list(tokenizer(_expanded(text, token, shown))["input_ids"])
    return _with_image_ids(ids, shown, token_id)


def _pixels(processor: Any, picture: Any) -> dict[str, Any]:
    """What an image processor makes of one picture."""
    return dict(getattr(processor, "image_processor", processor)(images=[picture], return_tensors="pt"))


def _expanded(text: str, token: str, images: Sequence[Image]) -> str:
    """The text with each image token as often as its image has pieces."""
    first, *others = text.split(token)
    return first + "".join(token * image.n_tokens + other for image, other in zip(images, others, strict=True))


def _with_image_ids(ids: Sequence[int], images: Sequence[Image], token: int) -> list[int]:
    pieces = [image.id for image in images for _ in range(image.n_tokens)]
    if ids.count(token) != len(pieces):
        raise ValueError(
            f"the processor makes {ids.count(token)} places for pieces of the pictures, the model {len(pieces)} "
            "pieces: the processor's settings (patch_size, vision_feature_select_strategy) are not this model's"
        )
    remaining = iter(pieces)
    return [next(remaining) if one == token else int(one) for one in ids]
