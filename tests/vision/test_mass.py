"""Mass between text and image, against sums over the patterns themselves."""

import pytest
import torch

from interp.vision import modality_mass
from tests.vision.seeing import SEEING, picture, seeing_model


@pytest.mark.parametrize("name", SEEING)
def test_mass_is_the_sum_over_the_pattern(name):
    model = seeing_model(name)
    text = "is this <image> a cat"
    tokens = torch.cat([model.to_tokens(text, images=[picture(seed)]) for seed in (0, 1)])
    found = modality_mass(model, tokens, batch_size=1, progress=False)
    is_image = model.images.mask(tokens)[0]
    _, cache = model.run_with_cache(tokens, "pattern")
    for layer in range(model.n_layers):
        pattern = cache["pattern", layer]
        for one, queries in (("image", is_image), ("text", ~is_image)):
            for other, keys in (("image", is_image), ("text", ~is_image)):
                expected = pattern[:, :, queries][..., keys].sum(-1).mean((0, 2))
                values = torch.from_numpy(found.sel({"from": one, "to": other, "layer": layer}).values)
                torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.from_numpy(found.sum("to").values), torch.ones(2, 3, 4), atol=1e-6, rtol=0)


def test_prompts_without_an_image_are_refused():
    with pytest.raises(ValueError, match="no prompt has an image"):
        modality_mass(seeing_model("llava"), torch.tensor([[10, 11]]))
