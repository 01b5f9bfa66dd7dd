"""Which positions of a prompt are pieces of an image, and where in the image they are."""

from __future__ import annotations

import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from interp.model import Model
from interp.model.images import Image
from interp.patching.labels import model_provenance


def token_map(model: Model, tokens: Int[Tensor, "prompt pos"]) -> xr.Dataset:
    """Image, row and column of every position.

    Args:
        model: the model that made the tokens (`model.to_tokens(text, images=[...])`).
        tokens: token ids of prompts of equal length.

    Returns:
        Dataset [prompt, position] of `image` (number of the image within its prompt), `row` and `column` (of the piece
        in the image's grid); -1 where there is none. `image >= 0` is what functions that ask for image positions take.
        Coordinate `token`: the tokens of the first prompt.

    Raises:
        ValueError: if an image is not there in whole.
    """
    image, row, column = (torch.full(tokens.shape, -1) for _ in range(3))
    for prompt, ids in enumerate(tokens.tolist()):
        for number, (first, placed) in enumerate(model.images.placed(ids)):
            pieces = torch.arange(placed.n_tokens)
            image[prompt, first + pieces] = number
            if placed.grid is not None:
                row[prompt, first + pieces] = pieces // placed.grid[1]
                column[prompt, first + pieces] = pieces % placed.grid[1]
    return xr.Dataset(
        {
            name: (("prompt", "position"), values.numpy())
            for name, values in (("image", image), ("row", row), ("column", column))
        },
        coords={
            "prompt": range(len(tokens)),
            "position": range(tokens.shape[1]),
            "token": ("position", model.to_str_tokens(tokens[0])),
        },
        attrs={**model_provenance(model), "method": "token_map"},
    )


def image_values(
    model: Model, prompt: Int[Tensor, "*one pos"], values: xr.DataArray, *, image: int = 0, dim: str = "position"
) -> xr.DataArray:
    """Values by position as values by row and column of one image: what maps over a picture are drawn from.

    Args:
        model: the model.
        prompt: token ids of one prompt.
        values: any array with an axis over the positions of that prompt.
        image: which image of the prompt.
        dim: the name of that axis: "key" for a pattern.

    Returns:
        The values with axes `row` and `column` last, in place of `dim`. Attr `image_id`: the token id of the image.

    Raises:
        ValueError: if there is no such image, or it has no grid.
    """
    first, placed = placed_image(model, prompt, image)
    if placed.grid is None:
        raise ValueError(f"image {image} of the prompt has {placed.n_tokens} pieces that are not one grid")
    there = values.isel({dim: slice(first, first + placed.n_tokens)})
    rest = [one for one in there.dims if one != dim]
    coords = {name: coord for name, coord in there.coords.items() if dim not in coord.dims}
    folded = there.transpose(*rest, dim).values.reshape(*(there.sizes[one] for one in rest), *placed.grid)
    return xr.DataArray(
        folded,
        dims=(*rest, "row", "column"),
        coords={**coords, "row": range(placed.grid[0]), "column": range(placed.grid[1])},
        name=values.name,
        attrs={**values.attrs, "image_id": placed.id},
    )


def without_images(model: Model, tokens: Int[Tensor, "prompt pos"]) -> Int[Tensor, "prompt left"]:
    """The prompts with all pieces of images taken out: the ablated input of `interp.heads.divergence`.

    Raises:
        ValueError: if the prompts have different numbers of pieces, so that what is left has no one length.
    """
    is_image = model.images.mask(tokens)
    left = (~is_image).sum(-1)
    if int(left.min()) != int(left.max()):
        raise ValueError(
            f"{int(left.min())} to {int(left.max())} tokens are left of the prompts; take prompts of one layout"
        )
    return tokens[~is_image].reshape(len(tokens), -1)


def placed_image(model: Model, prompt: Int[Tensor, "*one pos"], image: int) -> tuple[int, Image]:
    """(first position, image) of one image of a prompt.

    Raises:
        ValueError: if the prompt has no such image.
    """
    found = list(model.images.placed(prompt.reshape(-1).tolist()))
    if not 0 <= image < len(found):
        raise ValueError(f"the prompt has {len(found)} images; there is no image {image}")
    return found[image]
