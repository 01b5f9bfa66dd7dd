import numpy as np
import pytest
import torch
import xarray as xr

from interp import Model
from interp.vision.patch_grid import fold_patches, image_batches, patch_grid, vision_tower
from interp.vision.tower_attention import by_layer_and_image
from tests.model.families import FAMILIES
from tests.vision.seeing import SEEING, picture, processor, seeing_model
from tests.vision.towers import VISION, attentions, pixels, vision_model


@pytest.mark.parametrize(("name", "n_prefix"), list(zip(VISION, (1, 1, 3, 1), strict=True)))
def test_patterns_are_those_of_transformers(name, n_prefix) -> None:
    model, images = vision_model(name), pixels(3)
    found, grid = by_layer_and_image(model, images, lambda patterns, grid: patterns, batch_size=2)
    torch.testing.assert_close(found, attentions(model, images), atol=1e-6, rtol=0)
    assert (grid.n_rows, grid.n_columns, grid.n_prefix) == (4, 4, n_prefix)
    some, _ = by_layer_and_image(model, images, lambda patterns, grid: patterns, rows=[2, 0])
    torch.testing.assert_close(some, found[:, :, :, [2, 0]], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "n_prefix"), list(zip(SEEING, (1, 0, 0), strict=True)))
def test_towers_of_models_that_read(name, n_prefix) -> None:
    model = seeing_model(name)
    tokens = torch.cat([model.to_tokens("<image> what is", images=[picture(seed)]) for seed in (0, 1)])
    found, grid = by_layer_and_image(model, tokens, lambda patterns, grid: patterns)
    assert grid.n_prefix == n_prefix
    for row in (0, 1):
        _, cache = model.run_with_cache(tokens[row : row + 1], "vision.pattern")
        for layer in range(3):
            expected = cache[f"vision.blocks.{layer}.attn.hook_pattern"][0]
            torch.testing.assert_close(found[layer, row], expected, atol=1e-5, rtol=0)


def test_a_patch_is_where_its_pixels_are() -> None:
    """Qwen2-VL's processor reorders patches: light up one and see which row of pixels is bright."""
    model = seeing_model("qwen2_vl")
    for row, column in ((0, 1), (1, 2), (3, 0)):
        bright = np.zeros((16, 16, 3), dtype=np.uint8)
        bright[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 255
        inputs = processor("qwen2_vl")(images=[bright], return_tensors="pt")
        grid = patch_grid(model, inputs, len(inputs["pixel_values"]))
        brightest = int(inputs["pixel_values"].mean(-1).argmax())
        assert (int(grid.row[brightest]), int(grid.column[brightest])) == (row, column)


def test_folded_patches_stand_in_their_cells() -> None:
    values = xr.DataArray(
        [[1.0, 2, 3, 4, 5, 6]],
        dims=("image", "patch"),
        coords={"patch": range(6), "row": ("patch", [0, 0, 1, 1, 0, 1]), "column": ("patch", [0, 1, 0, 1, 2, 2])},
    )
    folded = fold_patches(values)
    assert folded.dims == ("image", "row", "column")
    np.testing.assert_array_equal(folded[0], [[1, 2, 5], [3, 4, 6]])


def test_what_is_no_image_is_said() -> None:
    reader = Model(FAMILIES["llama"].make_model())
    with pytest.raises(ValueError, match="has no vision transformer"):
        vision_tower(reader)
    llava = seeing_model("llava")
    with pytest.raises(ValueError, match="no image"):
        image_batches(llava, torch.tensor([[10, 11]]))
    qwen = seeing_model("qwen2_vl")
    two = qwen.to_tokens("<image> and <image>", images=[picture(0), picture(1)])
    with pytest.raises(ValueError, match="packs all its images into one row"):
        image_batches(qwen, two)
    with pytest.raises(ValueError, match="not one grid of 4 x 4 patches"):
        patch_grid(vision_model("vit"), pixels(), 7)
