import numpy as np
import pytest
import torch

from interp import vision
from interp.vision.outliers import above, largest
from tests.vision.seeing import picture, seeing_model
from tests.vision.towers import attentions, pixels, vision_model


def test_the_threshold_by_hand() -> None:
    norms = torch.ones(16)
    norms[5] = 9.0  # mean 1.5, deviation sqrt(15) / 2 = 1.94: 3 deviations above the mean is 7.31
    assert above(norms, 3.0).nonzero().flatten().tolist() == [5]
    assert not above(norms, 3.9).any()
    # One of ten values is sqrt(9) = 3 deviations above the mean at most.
    assert not above(torch.eye(10)[3], 3.0).any()
    assert not above(torch.ones(16), 3.0).any()


def test_the_top_by_hand() -> None:
    attention = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.0, 0.1, 0.2]])
    assert largest(attention, 2).tolist() == [[False, True, False, True], [True, False, False, True]]


@pytest.mark.parametrize(("name", "n_prefix"), [("vit", 1), ("dinov2_with_registers", 3), ("clip", 1)])
def test_norms_are_those_of_the_residual_stream(name, n_prefix) -> None:
    model, images = vision_model(name), pixels(3)
    _, cache = model.run_with_cache(images, "resid_post")
    found = vision.norm_outliers(model, images, sigmas=1.5, batch_size=2)
    assert found["norm"].dims == ("layer", "image", "patch")
    expected = np.stack([cache["resid_post", layer].norm(dim=-1)[:, n_prefix:].numpy() for layer in range(3)])
    np.testing.assert_allclose(found["norm"], expected, rtol=1e-5)
    threshold = expected.mean(-1, keepdims=True) + 1.5 * expected.std(-1, keepdims=True)
    np.testing.assert_array_equal(found["outlier"], expected > threshold)
    assert 0 < int(found["outlier"].sum()) < found["outlier"].size / 4


def test_a_planted_register_is_the_outlier() -> None:
    model, images = vision_model("vit"), pixels(2)

    def plant(resid, hook):
        resid[1, 1 + 7] *= 50  # the patch at row 1, column 3 of the second image

    with model.hooks([("blocks.1.hook_resid_post", plant)]):
        found = vision.norm_outliers(model, images)["outlier"]
    assert not found.sel(layer=0).any()
    where = found.sel(layer=1).values.nonzero()
    assert [one.tolist() for one in where] == [[1], [7]]
    assert (int(found["row"][7]), int(found["column"][7])) == (1, 3)
    assert vision.fold_patches(found).sel(layer=1, image=1, row=1, column=3)


@pytest.mark.parametrize(("name", "n_prefix"), [("vit", 1), ("dinov2_with_registers", 3)])
def test_damro_is_the_mean_over_split_heads(name, n_prefix) -> None:
    model, images = vision_model(name), pixels(2)
    found = vision.damro_outliers(model, images, k=3)
    from_cls = attentions(model, images)[:, :, :, 0, n_prefix:].mean(2)
    np.testing.assert_allclose(found["attention"], from_cls, atol=1e-6)
    for layer, image in ((0, 0), (2, 1)):
        top = set(np.argsort(-from_cls[layer, image].numpy())[:3].tolist())
        assert set(found["outlier"][layer, image].values.nonzero()[0].tolist()) == top


def test_a_batch_is_each_image_alone() -> None:
    model, images = vision_model("clip"), pixels(3)
    for measure in (vision.norm_outliers, lambda *given: vision.damro_outliers(*given, k=2)):
        together = measure(model, images)
        for number in range(3):
            alone = measure(model, {"pixel_values": images["pixel_values"][number : number + 1]})
            np.testing.assert_array_equal(together["outlier"][:, number], alone["outlier"][:, 0])


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_towers_of_models_that_read(name) -> None:
    model = seeing_model(name)
    tokens = torch.cat([model.to_tokens("<image> what is", images=[picture(seed)]) for seed in (0, 1)])
    found = vision.norm_outliers(model, tokens)
    assert found.sizes["image"] == 2
    _, cache = model.run_with_cache(tokens[1:], "vision.resid_post")
    last = cache["vision.blocks.2.hook_resid_post"][0].norm(dim=-1)
    np.testing.assert_allclose(found["norm"][2, 1], last[len(last) - found.sizes["patch"] :], rtol=1e-4)


def test_what_cannot_be_tested_is_said() -> None:
    model = seeing_model("paligemma")
    tokens = model.to_tokens("<image> what is", images=[picture(0)])
    with pytest.raises(ValueError, match="has no CLS token; use norm_outliers"):
        vision.damro_outliers(model, tokens, k=1)
    with pytest.raises(ValueError, match="k=17, but an image has 16 patches"):
        vision.damro_outliers(vision_model("vit"), pixels(), k=17)
    with pytest.raises(ValueError, match="at least one patch"):
        vision.damro_outliers(vision_model("vit"), pixels(), k=0)
