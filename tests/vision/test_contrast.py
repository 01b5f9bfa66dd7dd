import numpy as np
import pytest
import torch
import xarray as xr

from interp import vision
from interp.vision.contrast import contrast
from tests.vision.seeing import SEEING, picture, seeing_model


def prompts(model, seed: int = 0):
    texts = ("<image> what digit is this :", "<image> this is a cat")
    return [model.to_tokens(text, images=[picture(seed)]) for text in texts]


def a_map(rows) -> xr.DataArray:
    return xr.DataArray(np.array(rows, dtype=float), dims=("row", "column"), name="contrast")


def test_the_formula_by_hand() -> None:
    asked = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]])
    told = torch.tensor([[[0.4, 0.6], [0.1, 0.9]]])
    weights = torch.tensor([1.0, 2.0])
    expected = [0.5 / 0.5 + 2 * 0.9 / 0.2, 0.5 / 0.7 + 2 * 0.1 / 1.0]
    assert contrast(asked, told, weights, 0.1).tolist() == pytest.approx(expected)
    two_layers = contrast(torch.cat([asked, asked]), torch.cat([told, told]), weights, 0.1)
    assert two_layers.tolist() == pytest.approx([2 * one for one in expected])


def maps_by_steps(model, tokens, layer, steps):
    """Mean attention over heads to the four pieces, by growing the prompt and running it whole."""
    rows = []
    for _ in range(steps):
        _, cache = model.run_with_cache(tokens, "pattern", positions=-1)
        rows.append(cache["pattern", layer][0, :, 0, :4].mean(0))
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    shares = torch.stack(rows)
    return (shares / shares.sum(-1, keepdim=True)).numpy()


@pytest.mark.parametrize("name", SEEING)
def test_maps_are_those_of_the_pattern(name) -> None:
    model = seeing_model(name)
    asked, told = prompts(model)
    # PaliGemma reads a prompt both ways and goes on causally, so that only its first step is a prompt run whole.
    steps = 1 if name == "paligemma" else 3
    layers = [1] if name == "qwen2_vl" else [0, 2]  # its other layers have a window too short for these prompts
    found = vision.contrast_map(model, asked, told, layers=layers, steps=steps, smoothing=0.05)
    for index, layer in enumerate(layers):
        for kind, prompt in (("question", asked), ("generic", told)):
            expected = maps_by_steps(model, prompt, layer, steps)
            np.testing.assert_allclose(found[kind][index].values.reshape(steps, 4), expected, atol=1e-5)
    summed = sum(
        (step + 1) * found["question"][layer, step] / (found["generic"][layer, step] + 0.05)
        for layer in range(len(layers))
        for step in range(steps)
    )
    assert found["contrast"].notnull().all()
    np.testing.assert_allclose(found["contrast"], summed, rtol=1e-5)
    shares = found["question"].values
    np.testing.assert_allclose(found["entropy"], -(shares * np.log(shares)).sum((-2, -1)), rtol=1e-4)


def test_pieces_stay_in_place_as_a_window_moves_on() -> None:
    """The last position sees pieces 1, 2 and 3, then 2 and 3: a cache that drops the others must not shift the map."""
    model = seeing_model("qwen2_vl")
    asked = model.to_tokens("<image> what", images=[picture(0)])
    found = vision.contrast_map(model, asked, asked, layers=[0], steps=2)["question"].values.reshape(2, 4)
    np.testing.assert_allclose(found, maps_by_steps(model, asked, 0, 2), atol=1e-5)
    assert (found > 0).tolist() == [[False, True, True, True], [False, False, True, True]]
    too_long = vision.contrast_map(model, *prompts(model), layers=[0])
    assert too_long["question"].isnull().all()
    assert too_long["contrast"].isnull().all()


def test_later_steps_count_more_from_the_first_one_on() -> None:
    model = seeing_model("llava")
    asked, told = prompts(model)
    found = vision.contrast_map(model, asked, told, steps=4, first_step=2)
    assert found["step"].values.tolist() == [2, 3]
    assert found["weight"].values.tolist() == [1, 2]
    assert found["layer"].values.tolist() == [2]
    assert found.attrs["smoothing"] == pytest.approx(0.1 / 4)


def test_the_same_prompt_has_no_contrast_left() -> None:
    model = seeing_model("llava")
    asked, _ = prompts(model)
    found = vision.contrast_map(model, asked, asked, smoothing=1e-9)
    np.testing.assert_allclose(found["contrast"], 1, atol=1e-5)


def test_regions_by_hand() -> None:
    values = a_map([[9, 8, 0, 0], [0, 0, 0, 7], [0, 5, 0, 6], [1, 0, 0, 0]])
    top = vision.salient_regions(values, share=5 / 16, k=3)
    np.testing.assert_array_equal(top, values >= 5)
    np.testing.assert_array_equal(vision.salient_regions(values, share=5 / 16, k=2), values >= 6)
    np.testing.assert_array_equal(vision.salient_regions(values, share=5 / 16, k=1), values >= 8)
    assert bool(vision.salient_regions(values, share=1.0, k=1).all())
    # Corners do not connect: 4 and 3 touch 5 at none of its sides.
    diagonal = a_map([[5, 0], [0, 4]])
    assert vision.salient_regions(diagonal, share=0.5, k=1).values.tolist() == [[True, False], [False, False]]


def test_what_cannot_be_contrasted_is_said() -> None:
    model = seeing_model("llava")
    asked, told = prompts(model)
    with pytest.raises(ValueError, match="is not that of the generic instruction"):
        vision.contrast_map(model, asked, prompts(model, seed=1)[1])
    with pytest.raises(ValueError, match="there is no image 1"):
        vision.contrast_map(model, asked, told, image=1)
    with pytest.raises(ValueError, match=r"give some of layers 0\.\.2"):
        vision.contrast_map(model, asked, told, layers=[3])
    with pytest.raises(ValueError, match="steps=2"):
        vision.contrast_map(model, asked, told, steps=2, first_step=2)
    with pytest.raises(ValueError, match="more than 0"):
        vision.contrast_map(model, asked, told, smoothing=0.0)
    with pytest.raises(ValueError, match="share=0"):
        vision.salient_regions(a_map([[1, 2]]), share=0.0)
    with pytest.raises(ValueError, match="without NaN"):
        vision.salient_regions(a_map([[1, np.nan]]))
