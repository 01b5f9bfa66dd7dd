"""Positions of image pieces, against prompts whose layout is known."""

import numpy as np
import pytest
import torch
import xarray as xr

from interp.vision import image_values, token_map, without_images
from tests.vision.seeing import SEEING, picture, seeing_model


@pytest.fixture(scope="module")
def llava():
    return seeing_model("llava")


@pytest.mark.parametrize("name", SEEING)
def test_pieces_are_numbered_row_by_row(name):
    model = seeing_model(name)
    tokens = model.to_tokens("<image> what digit", images=[picture(0)])
    found = token_map(model, tokens)
    assert found["image"].values[0, :4].tolist() == [0, 0, 0, 0]
    assert found["row"].values[0, :4].tolist() == [0, 0, 1, 1]
    assert found["column"].values[0, :4].tolist() == [0, 1, 0, 1]
    assert set(found["image"].values[0, 4:].tolist()) == {-1}
    assert found["token"].values[-1] == "digit"


def test_images_of_a_prompt_are_counted(llava):
    tokens = llava.to_tokens("<image> is <image> this", images=[picture(0), picture(0)])
    assert token_map(llava, tokens)["image"].values[0].tolist() == [0, 0, 0, 0, -1, 1, 1, 1, 1, -1]


def test_values_fold_onto_the_grid_of_the_image_asked_for(llava):
    tokens = llava.to_tokens("is <image> is <image> this", images=[picture(0), picture(1)])
    values = xr.DataArray(
        np.arange(2 * tokens.shape[1]).reshape(2, -1), dims=("head", "key"), coords={"head": [3, 5]}, attrs={"a": 1}
    )
    folded = image_values(llava, tokens, values, image=1, dim="key")
    assert folded.dims == ("head", "row", "column")
    np.testing.assert_array_equal(folded.sel({"head": 3}), [[6, 7], [8, 9]])
    assert folded.attrs["image_id"] == int(tokens[0, 6])
    assert folded.attrs["a"] == 1


def test_an_image_that_is_not_there_is_refused(llava):
    tokens = llava.to_tokens("<image> this", images=[picture(0)])
    values = xr.DataArray(np.zeros(tokens.shape[1]), dims="position")
    with pytest.raises(ValueError, match="the prompt has 1 images; there is no image 1"):
        image_values(llava, tokens, values, image=1)


def test_prompts_without_their_images(llava):
    rows = [llava.to_tokens("is <image> this", images=[picture(seed)]) for seed in (0, 1)]
    left = without_images(llava, torch.cat(rows))
    assert llava.to_str_tokens(left[0]) == ["is", "this"]
    assert torch.equal(left[0], left[1])
    mixed = torch.cat([rows[0], torch.full((1, 6), 10)])
    with pytest.raises(ValueError, match="2 to 6 tokens are left"):
        without_images(llava, mixed)
