"""Verification re-computes what activation patching says of the same cells, and says how far the estimate was off."""

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats

import interp
from interp.metrics import logit_diff
from interp.patching import activation_patching
from interp.patching.atp_star import atp_star
from interp.patching.attribution import attribution_patching, normgrad
from interp.patching.verify import exact_cells, joint_effects, request_of, verified, verify_top
from tests.model.families import FAMILIES
from tests.patching.linear_model import linear_model, pairs_of_tokens

CASES = [
    ("resid_pre", ("layer", "position")),
    ("z", ("layer", "head")),
    ("z", ("head",)),
    ("k", ("layer", "position", "head")),
    ("pattern", ("layer", "head", "query", "key")),
    ("mlp_post", ("layer", "neuron")),
    ("mlp_out", ("layer",)),
    ("embed", ("position",)),
    ("attn_out", ()),
]


def tiny(name="llama"):
    return interp.load(FAMILIES[name].make_model("eager", torch.float64))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize(("site", "by"), CASES)
def test_the_top_entries_carry_their_exact_effects(site, by, direction):
    model, task = tiny(), pairs_of_tokens()
    options = {"site": site, "by": by, "direction": direction, "per_prompt": True}
    exact = activation_patching(model, task, **options)
    k = 5
    for per_prompt in (True, False):
        found = attribution_patching(model, task, verify=k, **(options | {"per_prompt": per_prompt}))
        scores = found.mean("prompt") if per_prompt else found
        effects = exact if per_prompt else exact.mean("prompt")
        run = found["exact"].notnull()
        run = run.all("prompt") if per_prompt else run
        assert int(run.sum()) == min(k, run.size)
        threshold = np.sort(abs(scores).values.ravel())[::-1][: int(run.sum())].min()
        assert bool((abs(scores).where(run, np.inf) >= threshold).all())
        np.testing.assert_allclose(found["exact"].where(run), effects.where(run), atol=1e-6)
        assert found.attrs["verify_k"] == int(run.sum())


def test_attrs_say_how_far_the_estimate_was_off():
    model, task = tiny("gpt2"), pairs_of_tokens()
    by = ("layer", "position")
    found = attribution_patching(model, task, site="mlp_out", by=by, verify=8)
    run = found["exact"].notnull().values
    scores, effects = found.values[run], found["exact"].values[run]
    expected = {
        "verify_pearson": stats.pearsonr(scores, effects).statistic,
        "verify_spearman": stats.spearmanr(scores, effects).statistic,
        "verify_sign_agreement": (np.sign(scores) == np.sign(effects)).mean(),
        "verify_largest_error": abs(scores - effects).max(),
    }
    assert expected["verify_largest_error"] > 0
    np.testing.assert_allclose([found.attrs[name] for name in expected], list(expected.values()), rtol=1e-9)
    assert "exact" not in attribution_patching(model, task, site="mlp_out", by=by).coords


def test_an_exact_estimate_is_confirmed():
    model, task = linear_model(), pairs_of_tokens()
    found = attribution_patching(model, task, site="z", by=("layer", "head"), verify=6)
    assert found.attrs["verify_largest_error"] < 1e-10
    assert found.attrs["verify_sign_agreement"] == 1
    np.testing.assert_allclose(found.attrs["verify_pearson"], 1)


def test_all_entries_can_be_verified_and_too_few_cannot():
    model, task = tiny(), pairs_of_tokens()
    found = attribution_patching(model, task, site="z", by=("layer", "head"), verify=1000)
    assert found.attrs["verify_k"] == found.size
    np.testing.assert_allclose(
        found["exact"], activation_patching(model, task, site="z", by=("layer", "head")), atol=1e-7
    )
    with pytest.raises(ValueError, match="verify=0"):
        attribution_patching(model, task, site="z", by=("layer", "head"), verify=0)
    with pytest.raises(ValueError, match="nothing of this estimate was run"):
        verified(attribution_patching(model, task, site="z"))


@pytest.mark.parametrize("estimate", [normgrad, atp_star])
def test_unsigned_estimates_are_verified_by_magnitudes(estimate):
    model, task = tiny(), pairs_of_tokens()
    options = {"site": "z", "by": ("layer", "head")}
    found = estimate(model, task, verify=4, **options)
    run = found["exact"].notnull()
    exact = abs(activation_patching(model, task, per_prompt=True, **options)).mean("prompt")
    np.testing.assert_allclose(found["exact"].where(run), exact.where(run), atol=1e-7)
    assert np.isnan(found.attrs["verify_sign_agreement"])


def test_verified_entries_side_by_side_largest_first():
    model, task = tiny(), pairs_of_tokens()
    for per_prompt in (False, True):
        estimate = attribution_patching(
            model, task, site="z", by=("layer", "position", "head"), per_prompt=per_prompt, verify=6
        )
        table = verified(estimate)
        assert table.sizes["cell"] == 6
        means = table.mean("prompt") if per_prompt else table
        assert (np.diff(abs(means["estimate"].values)) <= 0).all()
        for cell in range(6):
            place = {axis: int(table[axis][cell]) for axis in ("layer", "position", "head")}
            np.testing.assert_array_equal(table["estimate"].isel(cell=cell), estimate.sel(place))
            np.testing.assert_array_equal(table["exact"].isel(cell=cell), estimate["exact"].sel(place))
        np.testing.assert_allclose(table["error"], table["estimate"] - table["exact"])
        assert table.attrs["method"] == "attribution_patching"
        assert len(table.to_dataframe()) == 6 * (len(task) if per_prompt else 1)
    scalar = attribution_patching(model, task, site="attn_out", by=(), verify=1)
    assert verified(scalar).sizes["cell"] == 1


def test_a_verified_estimate_survives_a_file(tmp_path):
    model, task = tiny(), pairs_of_tokens()
    found = attribution_patching(model, task, site="z", by=("layer", "head"), verify=4)
    found.to_netcdf(tmp_path / "found.nc")
    with xr.open_dataarray(tmp_path / "found.nc") as read:
        np.testing.assert_array_equal(read["exact"], found["exact"])
        assert read.attrs["verify_k"] == 4
        np.testing.assert_array_equal(verified(read.load())["exact"], verified(found)["exact"])


def test_an_estimate_can_be_verified_later_and_turned_round():
    model, task = tiny(), pairs_of_tokens()
    plain = attribution_patching(model, task, site="k", by=("layer", "head"), direction="noise")
    at_once = attribution_patching(model, task, site="k", by=("layer", "head"), direction="noise", verify=3)
    later = verify_top(model, task, plain.transpose("head", "layer"), 3)
    np.testing.assert_allclose(later["exact"].transpose("layer", "head"), at_once["exact"], atol=1e-12)
    with pytest.raises(ValueError, match="3 prompts, the task has 2"):
        verify_top(model, task[:2], plain, 3)
    with pytest.raises(ValueError, match="lack direction"):
        verify_top(model, task, xr.DataArray(plain.values, dims=plain.dims, attrs={"site": "k"}), 3)


def test_a_metric_of_ones_own():
    model, task = tiny(), pairs_of_tokens()

    def doubled(logits, answers, wrong):
        return 2 * logit_diff(logits, answers, wrong)

    options = {"site": "z", "by": ("layer", "head"), "normalised": False}
    found = attribution_patching(model, task, metric=doubled, verify=3, **options)
    plain = attribution_patching(model, task, verify=3, **options)
    np.testing.assert_allclose(found["exact"], 2 * plain["exact"], atol=1e-9)
    with pytest.raises(ValueError, match="'doubled' is a function of your own"):
        verify_top(model, task, found, 3)
    again = verify_top(model, task, found, 3, metric=doubled)
    np.testing.assert_allclose(again["exact"], found["exact"], atol=1e-12)


def test_chosen_cells():
    model, task = tiny(), pairs_of_tokens()
    estimate = attribution_patching(model, task, site="z", by=("layer", "head"))
    cells = [{"layer": 2, "head": 1}, {"layer": 0, "head": 3}]
    found = exact_cells(model, task, estimate, cells)
    exact = activation_patching(model, task, site="z", by=("layer", "head"), per_prompt=True)
    for place, cell in enumerate(cells):
        np.testing.assert_allclose(found.isel(cell=place), exact.sel(cell), atol=1e-7)
    assert list(found["head"].values) == [1, 3]
    with pytest.raises(ValueError, match=r"head 9 is not in the estimate; it runs 0\.\.3"):
        exact_cells(model, task, estimate, [{"layer": 2, "head": 9}])
    with pytest.raises(ValueError, match="other axes than"):
        exact_cells(model, task, estimate, [{"layer": 2}])


@pytest.mark.parametrize(("site", "by"), CASES)
def test_cells_patched_together_are_those_of_a_coarser_sweep(site, by):
    if not by:
        pytest.skip("there is one cell")
    model, task = tiny(), pairs_of_tokens()
    asked = request_of(model, task, attribution_patching(model, task, site=site, by=by), None, None, False)
    # All cells that share a place on the first axis: what a sweep that keeps only that axis patches together.
    lengths = attribution_patching(model, task, site=site, by=by).shape
    subsets = [[(first, *rest) for rest in np.ndindex(lengths[1:])] for first in range(lengths[0])]
    found = joint_effects(asked, site, subsets).numpy()
    expected = activation_patching(model, task, site=site, by=by[:1], per_prompt=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    with_nothing = joint_effects(asked, site, [[], *subsets]).numpy()
    assert not with_nothing[:, 0].any()
    np.testing.assert_allclose(with_nothing[:, 1:], found, atol=1e-12)


def test_a_family_that_only_the_reference_way_serves():
    model, task = tiny("gptj"), pairs_of_tokens()
    found = attribution_patching(model, task, site="z", by=("layer", "head"), verify=3)
    exact = activation_patching(model, task, site="z", by=("layer", "head"))
    run = found["exact"].notnull()
    np.testing.assert_allclose(found["exact"].where(run), exact.where(run), atol=1e-7)
