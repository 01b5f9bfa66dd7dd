import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine, jensenshannon
from scipy.stats import spearmanr

from interp import Edit, vision
from interp.vision.importance import METRICS
from tests.vision.seeing import SEEING, picture, seeing_model
from tests.vision.towers import pixels, vision_model


def one_by_one(model, image, label, ablation, means):
    """The first three metrics of each head of one image, each from a run of its own."""

    def run(edits):
        seen = {}
        with model.edited(edits):
            logits = model.run_with_hooks(image, [("ln_final", lambda act, hook: seen.update(cls=act[0, 0].double()))])
        return logits[0].double().softmax(-1).numpy(), seen["cls"].numpy()

    before, cls = run([])
    found = np.zeros((3, model.n_layers, model.n_heads))
    for layer in range(model.n_layers):
        for head in range(model.n_heads):
            value = 0.0 if ablation == "zero" else means[layer][head]
            after, ablated = run([Edit(f"blocks.{layer}.attn.hook_z", heads=[head], value=value)])
            found[:, layer, head] = (
                before[label] - after[label],
                jensenshannon(before, after) ** 2,
                cosine(cls, ablated),
            )
    return found


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_ablations_equal_runs_one_by_one(ablation) -> None:
    model, images, labels = vision_model("vit"), pixels(3), torch.tensor([1, 4, 0])
    _, cache = model.run_with_cache(images, "z")
    means = cache.stack("z").mean((1, 2))
    found = vision.vision_importance(model, images, labels, ablation=ablation, batch_size=5)
    expected = [
        one_by_one(model, {"pixel_values": image[None]}, int(label), ablation, means)
        for image, label in zip(images["pixel_values"], labels, strict=True)
    ]
    np.testing.assert_allclose(found["importance"][:3], np.mean(expected, axis=0), atol=2e-6)
    assert np.abs(expected).max() > 1e-2
    assert found.attrs["ablation"] == ablation
    np.testing.assert_array_equal(found["label"], labels)


def test_gradient_equals_finite_differences_of_a_gate() -> None:
    model, images = vision_model("dinov2", dtype=torch.float64), pixels(2)
    images = {"pixel_values": images["pixel_values"].double()}
    labels = torch.tensor([2, 3])
    found = vision.vision_importance(model, images, labels)["importance"].sel(metric="gradient")
    step = 1e-4
    for layer, head in ((0, 0), (1, 2), (2, 3)):
        changes = []
        for scale in (1 + step, 1 - step):
            with model.edited(Edit(f"blocks.{layer}.attn.hook_z", heads=[head], scale=scale)):
                changes.append(model(images).log_softmax(-1)[torch.arange(2), labels])
        slopes = (changes[0] - changes[1]) / (2 * step)
        assert float(found[layer, head]) == pytest.approx(float(slopes.abs().mean()), rel=1e-4)


def test_rank_correlation_is_spearmans() -> None:
    found = vision.vision_importance(vision_model("vit"), pixels(2))
    expected = spearmanr(found["importance"].values.reshape(4, -1).T).statistic
    np.testing.assert_allclose(found["rank_correlation"], expected, atol=1e-6)
    np.testing.assert_array_equal(found["label"], vision_model("vit")(pixels(2)).argmax(-1))
    assert (found["low"] <= found["importance"] + 1e-6).all()
    assert list(found["metric"].values) == list(METRICS)


def test_a_model_without_classes_has_its_embedding_only() -> None:
    model, images = vision_model("clip"), pixels(2)
    found = vision.vision_importance(model, images)["importance"]
    assert found.sel(metric=["probability_drop", "js_divergence", "gradient"]).isnull().all()
    _, cache = model.run_with_cache(images, "ln_final")
    with model.edited(Edit("blocks.1.attn.hook_z", heads=[2], value=0.0)):
        _, ablated = model.run_with_cache(images, "ln_final")
    expected = 1 - torch.cosine_similarity(cache["ln_final"][:, 0], ablated["ln_final"][:, 0]).mean()
    assert float(found.sel(metric="cls_distance")[1, 2]) == pytest.approx(float(expected), abs=1e-6)

    directions = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    probed = vision.vision_importance(model, images, classifier=lambda hidden: hidden[:, 0] @ directions)
    assert probed["importance"].notnull().all()
    np.testing.assert_array_equal(probed["label"], (model(images)[:, 0] @ directions).argmax(-1))


@pytest.mark.parametrize("name", SEEING)
def test_towers_of_models_that_read(name) -> None:
    model = seeing_model(name)
    tokens = torch.cat([model.to_tokens("<image> what is", images=[picture(seed)]) for seed in (0, 1)])
    found = vision.vision_importance(model, tokens, batch_size=3, progress=False)
    together, alone = found["importance"], []
    for row in tokens:
        alone.append(vision.vision_importance(model, row[None])["importance"])
    np.testing.assert_allclose(together, np.mean(alone, axis=0), atol=1e-5)
    before = model(tokens)[:, -1].softmax(-1)
    with model.edited(Edit("vision.blocks.1.attn.hook_z", heads=[3], value=0.0)):
        after = [model(row[None])[0, -1].softmax(-1) for row in tokens]
    drop = np.mean([float(p.max() - q[p.argmax()]) for p, q in zip(before, after, strict=True)])
    assert float(together.sel(metric="probability_drop")[1, 3]) == pytest.approx(drop, abs=1e-5)


def test_what_does_not_fit_is_said_first() -> None:
    model = vision_model("vit")
    with pytest.raises(ValueError, match="ablation='noise'; it is one of zero, mean"):
        vision.vision_importance(model, pixels(2), ablation="noise")
    with pytest.raises(ValueError, match="give one class for each of 2 images"):
        vision.vision_importance(model, pixels(2), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"classes run 0\.\.4"):
        vision.vision_importance(model, pixels(2), torch.tensor([0, 5]))
    llava = seeing_model("llava")
    two = llava.to_tokens("<image> and <image>", images=[picture(0), picture(1)])
    with pytest.raises(ValueError, match="give prompts with one image each"):
        vision.vision_importance(llava, two)
