"""Every method by name: called alike, results alike, and several sites as each alone."""

import numpy as np
import pytest
import torch

import interp
from interp.patching import METHODS, activation_patching, estimates
from tests.model.families import FAMILIES
from tests.patching.linear_model import pairs_of_tokens

ONE_BACKWARD = ("atp", "atp+qk", "relp", "secant", "gradxinput", "normgrad")


@pytest.fixture(scope="module")
def model():
    return interp.load(FAMILIES["llama"].make_model("eager", torch.float64))


@pytest.fixture(scope="module")
def task():
    return pairs_of_tokens()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_every_method_is_called_as_activation_patching(model, task, method, direction):
    options = {"site": "z", "by": ("layer", "head"), "direction": direction, "per_prompt": True, "batch_size": 2}
    found = METHODS[method](model, task, progress=False, **options)
    exact = activation_patching(model, task, **options)
    assert found.dims == exact.dims
    assert set(found.coords) == set(exact.coords)
    for name in ("site", "direction", "metric", "normalised", "n_prompts", "model"):
        assert found.attrs[name] == exact.attrs[name]
    assert bool(np.isfinite(found).all())
    assert bool((abs(found) > 0).any())
    again = METHODS[method](model, task, progress=False, **options)
    np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize("method", METHODS)
def test_several_sites_are_each_alone(model, task, method):
    sites = ["q", "z", "mlp_out"]
    together = estimates(model, task, sites=sites, method=method, by=("layer", "position"))
    assert list(together) == sites
    for site in sites:
        alone = METHODS[method](model, task, site=site, by=("layer", "position"))
        np.testing.assert_allclose(together[site], alone, atol=1e-6)
        same = {name for name, value in alone.attrs.items() if not isinstance(value, float)}
        assert {name: together[site].attrs[name] for name in same} == {name: alone.attrs[name] for name in same}


@pytest.mark.parametrize("method", ONE_BACKWARD)
def test_several_sites_share_their_passes(model, task, method, monkeypatch):
    calls = []
    forward = model._forward
    monkeypatch.setattr(model, "_forward", lambda *args: calls.append(1) or forward(*args))
    estimates(model, task, sites=["resid_pre", "z", "mlp_out"], method=method)
    assert len(calls) == 2


def test_verification_and_unknown_names(model, task):
    found = estimates(model, task, sites=["z", "v"], method="relp", by=("layer", "head"), verify=3)
    for one in found.values():
        assert int(one["exact"].notnull().sum()) == 3
    with pytest.raises(ValueError, match=r"'rel' is not an estimate; did you mean 'relp'"):
        estimates(model, task, sites=["z"], method="rel")
