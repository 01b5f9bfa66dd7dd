import numpy as np
import pytest
import torch

from interp import vision
from interp.vision.baselines import VARIANTS, combined_layers, norm_grad, rollout
from tests.vision.seeing import SEEING, picture, seeing_model
from tests.vision.towers import attentions, pixels, vision_model


def test_rollout_by_hand() -> None:
    shift = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]])  # each token to the one before it
    total = rollout(torch.stack([shift, shift]))
    # From the last token two steps of "stay or go back", each with one half.
    torch.testing.assert_close(total[2], torch.tensor([0.25, 0.5, 0.25]))
    # Later layers come first: back in layer 1, then first token to last in layer 0.
    to_last = torch.tensor([[0.0, 0, 1], [0, 1, 0], [0, 0, 1]])
    torch.testing.assert_close(rollout(torch.stack([to_last, shift]))[1], torch.tensor([0.25, 0.5, 0.25]))
    # Rows that a learned sink leaves short of 1 are normalised.
    torch.testing.assert_close(rollout(torch.eye(2)[None] / 2), torch.eye(2))


@pytest.mark.parametrize(("name", "n_prefix"), [("vit", 1), ("dinov2_with_registers", 3)])
def test_rollout_of_a_model_equals_a_loop(name, n_prefix) -> None:
    model, images = vision_model(name), pixels(2)
    found = vision.vision_rollout(model, images, batch_size=1)
    for image in range(2):
        total = np.eye(16 + n_prefix)
        for pattern in attentions(model, images)[:, image].mean(1).double().numpy():
            total = (pattern + np.eye(len(total))) / 2 @ total
        np.testing.assert_allclose(found[image], total[0, n_prefix:], atol=1e-6)
    assert found.attrs["faithful"] == "no"
    assert vision.fold_patches(found).sizes == {"image": 2, "row": 4, "column": 4}


def test_without_cls_rollout_is_the_mean_over_patches() -> None:
    model = seeing_model("qwen2_vl")
    tokens = model.to_tokens("<image> what is", images=[picture(0)])
    found = vision.vision_rollout(model, tokens)
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", SEEING)
def test_rollout_of_prompts_equals_a_loop(name) -> None:
    model = seeing_model(name)
    tokens = torch.cat([model.to_tokens("<image> what is", images=[picture(seed)]) for seed in (0, 1)])
    found = vision.attention_rollout(model, tokens, batch_size=1)
    _, cache = model.run_with_cache(tokens, "pattern")
    total = torch.eye(tokens.shape[1])
    for layer in range(3):
        total = (cache["pattern", layer][1].mean(0) + torch.eye(len(total))) / 2 @ total
    np.testing.assert_allclose(found[1], total[-1], atol=1e-5)
    over_image = vision.image_values(model, tokens[1], found[1])
    np.testing.assert_allclose(over_image.values.ravel(), found[1, :4])


def test_norm_grad_by_hand() -> None:
    x, g = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, -1.0]])
    assert norm_grad(x, g)[:, 0].tolist() == pytest.approx([5 * 2**0.5, 5, 2**0.5, -1])


def test_layers_combine_by_product() -> None:
    values = torch.tensor([[[[2.0, 1.0]], [[0.0, 0.0]], [[-1.0, 4.0]]]])  # [variant, layer, item, token]
    assert combined_layers(values)[0, 0].tolist() == pytest.approx([-0.25, 0.5])
    assert combined_layers(values[:, 1:2]).isnan().all()


def test_norm_grad_of_images_equals_finite_differences() -> None:
    model, images = vision_model("vit", dtype=torch.float64), pixels(2)
    images = {"pixel_values": images["pixel_values"].double()}
    labels = torch.tensor([1, 3])
    found = vision.vision_norm_grad(model, images, labels, batch_size=1)
    site, image, patch, step = "blocks.1.hook_resid_pre", 1, 6, 1e-2

    def log_prob(change):
        def move(resid, hook):
            resid[image, 1 + patch] += change

        return model.run_with_hooks(images, [(site, move)])[image].log_softmax(-1)[labels[image]]

    # transformers takes softmax in float32, so that the step cannot be small.
    basis = step * torch.eye(model.d_model, dtype=torch.float64)
    gradient = torch.stack([(log_prob(one) - log_prob(-one)) / (2 * step) for one in basis])
    _, cache = model.run_with_cache(images, site)
    expected = norm_grad(cache[site][image, 1 + patch], gradient)
    np.testing.assert_allclose(found["saliency"].sel(layer=1, image=image, patch=patch), expected, atol=2e-4)
    assert found["saliency"].sizes == {"variant": 4, "layer": 3, "image": 2, "patch": 16}


@pytest.mark.parametrize("name", SEEING)
def test_norm_grad_of_prompts_and_towers(name) -> None:
    model = seeing_model(name)
    tokens = torch.cat([model.to_tokens("<image> what is", images=[picture(seed)]) for seed in (0, 1)])
    labels = torch.tensor([7, 12])
    by_token = vision.token_norm_grad(model, tokens, labels)
    site = "blocks.1.hook_resid_pre"
    _, x, g = model.run_with_gradients(
        tokens, lambda logits: logits[:, -1].log_softmax(-1)[torch.arange(2), labels], site
    )
    expected = norm_grad(x[site], g[site])
    np.testing.assert_allclose(by_token["saliency"].sel(layer=1), expected, rtol=1e-3, atol=1e-5)
    product = by_token["saliency"].sel(variant="norm_product").prod("layer")
    combined = by_token["combined"].sel(variant="norm_product")
    np.testing.assert_allclose(combined / combined.max("position"), product / product.max("position"), rtol=1e-3)
    of_patches = vision.vision_norm_grad(model, tokens, labels)
    assert of_patches["combined"].notnull().all()
    assert list(of_patches["variant"].values) == list(VARIANTS)
    alone = vision.vision_norm_grad(model, tokens[1:], labels[1:])
    np.testing.assert_allclose(of_patches["saliency"][:, :, 1], alone["saliency"][:, :, 0], rtol=2e-3, atol=1e-5)


def test_what_has_no_classes_is_said() -> None:
    model, images = vision_model("clip"), pixels(2)
    with pytest.raises(ValueError, match="predicts no classes; give classifier="):
        vision.vision_norm_grad(model, images)
    assert vision.vision_norm_grad(model, images, classifier=lambda hidden: hidden[:, 0])["saliency"].notnull().all()
    llava = seeing_model("llava")
    tokens = llava.to_tokens("<image> what is", images=[picture(0)])
    with pytest.raises(ValueError, match="give one token for each of 1 prompts"):
        vision.token_norm_grad(llava, tokens, torch.tensor([1, 2]))
