import numpy as np
import pytest
import torch
import xarray as xr

from interp import vision
from interp.vision.clusters import _features
from interp.vision.patch_grid import patch_grid
from tests.vision.seeing import SEEING, picture, seeing_model
from tests.vision.towers import VISION, attentions, pixels, vision_model


def planted(maps: list[torch.Tensor], n_layers: int) -> xr.DataArray:
    """Heads of the given kinds in every layer, each a little different."""
    generator = torch.Generator().manual_seed(0)
    stacked = torch.stack([torch.stack(maps) for _ in range(n_layers)])
    noisy = stacked + 0.02 * torch.rand(stacked.shape, generator=generator)
    return xr.DataArray(
        (noisy / noisy.sum(-1, keepdim=True)).numpy(),
        dims=("layer", "head", "query", "key"),
        coords={"layer": range(n_layers), "head": range(len(maps))},
    )


def kinds(n: int) -> list[torch.Tensor]:
    """Twice the identity, the previous token, the first token, everything alike."""
    first = torch.zeros(n, n)
    first[:, 0] = 1
    return [torch.eye(n), torch.eye(n), torch.eye(n).roll(-1, 1), first, torch.full((n, n), 1 / n)]


def is_grouped(clusters: xr.DataArray) -> bool:
    """Whether heads share a cluster exactly if they are of one kind, in all layers."""
    one = clusters.values[0]
    return bool((clusters.values == one).all() and one[0] == one[1] and len(set(one.tolist())) == 4)


def test_features_of_planted_patterns() -> None:
    grid = patch_grid(vision_model("vit"), pixels(1), 17)
    patterns = torch.zeros(1, 4, 17, 17)
    patterns[0, 0] = torch.eye(17)
    patterns[0, 1, :, 0] = 0.75  # mostly CLS, then itself
    patterns[0, 1] += 0.25 * torch.eye(17)
    patterns[0, 2] = torch.eye(17).roll(-1, 1)  # the token before
    patterns[0, 3] = 1 / 17
    found = dict(zip(("self", "cls", "previous", "uniform"), _features(patterns, grid)[0], strict=True))
    n_hops = 4
    assert found["self"].tolist() == pytest.approx([1, 0, 0, 0, 0, 0, 1 / 16, 0])
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(17)
    assert found["cls"].tolist() == pytest.approx([1, 0, 0, 0, entropy, 0.75, 0.75, 0])
    # The first patch looks at CLS alone; three of the other fifteen look at the end of the row above, 3 columns away.
    assert found["previous"].tolist() == pytest.approx([0, 0.8, 0, 0.2, 0, 1 / 16, 1 / 16, 1])
    assert found["uniform"][n_hops:].tolist() == pytest.approx([1, 1 / 17, 1 / 17, 1 / 17])


@pytest.mark.parametrize("name", VISION)
def test_features_of_models(name) -> None:
    model, images = vision_model(name), pixels(3)
    found = vision.pattern_features(model, images, batch_size=2)
    assert found.sizes == {"layer": 3, "head": 4, "feature": 8}
    profile = vision.khop_profile(model, images)["mass"]
    np.testing.assert_allclose(found.sel(feature=[f"hop_{hop}" for hop in range(4)]), profile, atol=1e-6)
    n_prefix = attentions(model, images).shape[-1] - 16
    expected = attentions(model, images)[..., n_prefix:, :n_prefix].sum(-1).mean((1, 3))
    np.testing.assert_allclose(found.sel(feature="prefix"), expected, atol=1e-6)


def test_clusters_find_planted_kinds() -> None:
    grid = patch_grid(vision_model("vit"), pixels(1), 17)
    patterns = planted(kinds(17), 3)
    values = _features(torch.tensor(patterns.values), grid)
    features = xr.DataArray(values, dims=("layer", "head", "feature"), coords={"feature": list("abcdefgh")})
    found = vision.cluster_heads(features, n_clusters=4, seed=1)
    assert is_grouped(found["cluster"])
    assert (found["cluster"][:, :2] == 0).all()  # the largest comes first
    again = vision.cluster_heads(features, n_clusters=4, seed=1)
    xr.testing.assert_identical(found, again)
    assert found.attrs["method"] == "cluster_heads"
    # Two components of a singular value decomposition of the standardised features, up to sign.
    rows = values.reshape(-1, 8).double().numpy()
    standardised = (rows - rows.mean(0)) / rows.std(0)
    u, s, _ = np.linalg.svd(standardised)
    np.testing.assert_allclose(np.abs(found["coordinate"].values.reshape(-1, 2)), np.abs(u[:, :2] * s[:2]), atol=1e-6)
    np.testing.assert_allclose(found["explained"], (s**2 / (s**2).sum())[:2], atol=1e-6)


def test_codes_find_planted_kinds_and_reproduce() -> None:
    state = torch.random.get_rng_state()
    found = vision.pattern_codes(planted(kinds(9), 3), n_clusters=4, seed=3, progress=False)
    assert is_grouped(found["cluster"])
    assert float(found["loss"][-1]) < 0.2 * float(found["loss"][0])
    assert torch.equal(torch.random.get_rng_state(), state)
    xr.testing.assert_identical(found, vision.pattern_codes(planted(kinds(9), 3), n_clusters=4, seed=3))


def test_mean_patterns_are_shrunk_means() -> None:
    model, images = vision_model("vit"), pixels(3)
    whole = attentions(model, images).mean(1)
    np.testing.assert_allclose(vision.mean_patterns(model, images, side=40), whole, atol=1e-6)
    halves = vision.mean_patterns(model, images, side=1)
    np.testing.assert_allclose(halves[..., 0, 0], whole.mean((-2, -1)), atol=1e-6)


@pytest.mark.parametrize("name", SEEING)
def test_towers_of_models_that_read(name) -> None:
    model = seeing_model(name)
    tokens = model.to_tokens("<image> what is", images=[picture(0)])
    assert vision.cluster_heads(vision.pattern_features(model, tokens), n_clusters=2)["cluster"].shape == (3, 4)
    found = vision.pattern_codes(vision.mean_patterns(model, tokens), n_clusters=2, epochs=3)
    assert found.attrs["epochs"] == 3


def test_the_figure_names_every_head() -> None:
    found = vision.pattern_codes(planted(kinds(5), 2), n_clusters=4, epochs=20)
    figure = vision.draw_clusters(found)
    named = [name for trace in figure.data for name in trace.customdata]
    assert sorted(named) == [f"L{layer}H{head}" for layer in range(2) for head in range(5)]
    for trace in figure.data:
        for name, x in zip(trace.customdata, trace.x, strict=True):
            assert x == float(found["coordinate"][int(name[1]), int(name[3]), 0])
    assert figure.layout.title.text == "10 heads in 4 clusters of alike patterns"
    assert figure.layout.xaxis.title.text == "code 1"


def test_what_cannot_be_clustered_is_said() -> None:
    features = xr.DataArray(np.ones((1, 3, 2)), dims=("layer", "head", "feature"), coords={"feature": ["a", "b"]})
    with pytest.raises(ValueError, match="all heads have the same features"):
        vision.cluster_heads(features, n_clusters=2)
    features[0, 1, 1] = 2
    with pytest.raises(ValueError, match="n_clusters=3; there are 2 heads that differ"):
        vision.cluster_heads(features, n_clusters=3)
    features[0, 1, 1] = np.nan
    with pytest.raises(ValueError, match="features b are NaN"):
        vision.cluster_heads(features)
    with pytest.raises(ValueError, match="must be layer, head, feature"):
        vision.cluster_heads(features.rename(layer="block"))
    with pytest.raises(ValueError, match="must be layer, head, query, key"):
        vision.pattern_codes(features)
    with pytest.raises(ValueError, match="the same everywhere"):
        vision.pattern_codes(planted([torch.ones(4, 4)], 1) * 0)
