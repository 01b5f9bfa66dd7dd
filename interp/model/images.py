"""Images in prompts: a token id beyond the vocabulary stands for one piece of one image.

Every analysis here works on rows of token ids. So an image gets an id of its own, made of its content, and stands in a
prompt as a run of that id, one for each piece (patch) that the language model receives. Where a forward pass begins,
`ImageBook.expand` turns such rows into what transformers takes: the model's own image token, and the pixels of all
images in reading order. The vision tower runs with every pass, so its sites can be read, edited and patched as well.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.model.anatomy import IMAGE_TOKEN_TYPE

FIRST_ID = 2**40
"""Image ids start here, beyond any vocabulary."""


@dataclass(frozen=True, eq=False)
class Image:
    """One image as the model receives it."""

    id: int
    """The token id that stands for each of its pieces; the same for the same pixels."""
    inputs: Mapping[str, Tensor]
    """Arguments of the model that carry it, for a batch of this image alone: `pixel_values`, ..."""
    model_token: int
    """The id that the model itself has for a piece of any image."""
    n_tokens: int
    """Positions that it takes up in a prompt."""
    grid: tuple[int, int] | None
    """(rows, columns) of its pieces; None where they are not one grid."""
    picture: Any = None
    """The picture it was made of (PIL), for drawing."""


class ImageBook:
    """The images that a model has been shown.

    Args:
        hf: the transformers model.
        arguments: names that its `forward` takes.
    """

    def __init__(self, hf: Any, arguments: Collection[str]) -> None:
        self._hf = hf
        self._arguments = frozenset(arguments)
        self._images: dict[int, Image] = {}

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, image_id: int) -> Image:
        """The image of an id.

        Raises:
            ValueError: if this model has not been shown it.
        """
        if image_id not in self._images:
            raise ValueError(
                f"token {image_id} is no id of this vocabulary, nor of an image that this model has been shown: "
                "give its image to to_tokens(text, images=[...]) first"
            )
        return self._images[image_id]

    @property
    def token(self) -> int | None:
        """The model's own id for a piece of an image; None if it takes no images in its prompts."""
        config = self._hf.config
        for name in ("image_token_id", "image_token_index"):
            if getattr(config, name, None) is not None and "pixel_values" in self._arguments:
                return int(getattr(config, name))
        return None

    @torch.no_grad()
    def add(self, inputs: Mapping[str, Tensor], *, picture: Any = None) -> Image:
        """Show the model an image; showing it again changes nothing.

        Runs the vision tower once, to see how many pieces it makes of the image.

        Args:
            inputs: arguments of the model for this image alone, as its image processor makes them.
            picture: what they were made of, for drawing.

        Raises:
            ValueError: if this model takes no images in its prompts.
        """
        token = self.token
        if token is None:
            raise ValueError(f"{type(self._hf).__name__} takes no images in its prompts")
        image_id = FIRST_ID + _content_number(inputs)
        if image_id not in self._images:
            n_tokens = self._n_tokens(inputs)
            kept = {name: value.clone() for name, value in inputs.items()}
            self._images[image_id] = Image(image_id, kept, token, n_tokens, self._grid(inputs, n_tokens), picture)
        return self._images[image_id]

    def _n_tokens(self, inputs: Mapping[str, Tensor]) -> int:
        takes = inspect.signature(self._hf.get_image_features).parameters
        device = next(self._hf.parameters()).device
        given = {name: value.to(device) for name, value in inputs.items() if name in takes}
        features = self._hf.get_image_features(**given, return_dict=True).pooler_output
        pieces = [features] if isinstance(features, Tensor) else features
        return sum(one.shape[:-1].numel() for one in pieces)

    def _grid(self, inputs: Mapping[str, Tensor], n_tokens: int) -> tuple[int, int] | None:
        vision = self._hf.config.vision_config
        if "image_grid_thw" in inputs:
            merged = getattr(vision, "spatial_merge_size", 1)
            n_frames, rows, columns = (int(one) for one in inputs["image_grid_thw"][0])
            return (rows // merged, columns // merged) if n_frames == 1 else None
        rows, columns = (size // vision.patch_size for size in inputs["pixel_values"].shape[-2:])
        return (rows, columns) if rows * columns == n_tokens else None

    def mask(self, tokens: Int[Tensor, "*axes"]) -> Bool[Tensor, "*axes"]:
        """Which positions are pieces of an image."""
        return tokens >= FIRST_ID

    def placed(self, tokens: Sequence[int]) -> Iterator[tuple[int, Image]]:
        """(first position, image) of every image in one prompt, in reading order.

        Raises:
            ValueError: if one is not there in whole.
        """
        position = 0
        while position < len(tokens):
            if tokens[position] < FIRST_ID:
                position += 1
                continue
            image = self[tokens[position]]
            run = tokens[position : position + image.n_tokens]
            if len(run) < image.n_tokens or set(run) != {image.id}:
                raise ValueError(
                    f"the image at position {position} has {image.n_tokens} pieces; not all of them are in the prompt"
                )
            yield position, image
            position += image.n_tokens

    def labels(self, tokens: Sequence[int]) -> dict[int, str]:
        """What to call each position that is a piece of an image: `[row,column]`, or `[piece]` without a grid."""
        named: dict[int, str] = {}
        piece = 0
        for position, token in enumerate(tokens):
            if token >= FIRST_ID:
                goes_on = position > 0 and tokens[position - 1] == token
                piece = (piece + 1) % self[token].n_tokens if goes_on else 0
                named[position] = _cell_label(self[token], piece)
        return named

    def expand(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Arguments as transformers takes them, from arguments whose token ids may name images.

        Raises:
            ValueError: for an id that is neither in the vocabulary nor an image shown to this model.
        """
        tokens = inputs.get("input_ids")
        if not isinstance(tokens, Tensor) or not bool((tokens >= FIRST_ID).any()):
            return inputs
        images = [image for row in tokens.tolist() for _, image in self.placed(row)]
        is_image = self.mask(tokens)
        expanded = dict(inputs) | {"input_ids": tokens.masked_fill(is_image, images[0].model_token)}
        for name in images[0].inputs:
            expanded[name] = torch.cat([image.inputs[name] for image in images]).to(tokens.device)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in self._arguments:
                expanded[name] = is_image.int() * IMAGE_TOKEN_TYPE.get(self._hf.config.model_type, 1)
        if "image_grid_thw" in expanded:
            # Positions in the grid of an image: transformers counts these itself, padding included.
            expanded.pop("position_ids", None)
        return expanded


def _cell_label(image: Image, piece: int) -> str:
    return f"[{piece}]" if image.grid is None else f"[{piece // image.grid[1]},{piece % image.grid[1]}]"


def _content_number(inputs: Mapping[str, Tensor]) -> int:
    """A number of 40 bits made of the content, so that an id means the same image in every session."""
    digest = hashlib.sha256()
    for name in sorted(inputs):
        value = inputs[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return int(digest.hexdigest(), 16) % FIRST_ID
