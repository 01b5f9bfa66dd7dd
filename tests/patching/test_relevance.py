"""Relevance patching: scores against sums written out, and what the rules buy where the answer is known."""

import pytest
import torch

import interp
from interp.patching import activation_patching
from interp.patching.attribution import attribution_patching
from interp.patching.relevance import relevance_patching
from interp.patching.rules import PRESETS, relevance_rules
from tests.model.case import state_of
from tests.model.families import FAMILIES
from tests.patching.tokens_task import task_of_tokens


def tokens(seed, n=3, length=9):
    return torch.randint(5, 60, (n, length), generator=torch.Generator().manual_seed(seed))


def make(name, dtype=torch.float64):
    family = FAMILIES[name]
    model = interp.Model(family.make_model(family.implementations[-1], dtype), name=name)
    clean, corrupted = tokens(0), tokens(0)
    corrupted[:, 3:5] = tokens(1)[:, 3:5]
    return model, task_of_tokens(clean, corrupted)


@pytest.mark.parametrize("rules", PRESETS)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_score_is_difference_times_coefficient(name, direction, rules):
    model, task = make(name)
    base, other = (task.corrupted, task.clean) if direction == "denoise" else (task.clean, task.corrupted)
    _, others = model.run_with_cache(other, ["z", "mlp_out"])
    with relevance_rules(model, rules):
        _, here, coefficient = model.run_with_gradients(
            base, lambda logits: logits[:, -1, 5] - logits[:, -1, 9], ["z", "mlp_out"]
        )
    sign = 1 if direction == "denoise" else -1
    options = {"rules": rules, "direction": direction, "normalised": False, "per_prompt": True}
    heads = relevance_patching(model, task, site="z", by=("layer", "head"), **options)
    results = relevance_patching(model, task, site="result", by=("layer", "head"), **options)
    places = relevance_patching(model, task, site="mlp_out", **options)
    for layer in range(model.n_layers):
        score = sign * (others["z", layer] - here["z", layer]) * coefficient["z", layer]
        torch.testing.assert_close(torch.tensor(heads.sel(layer=layer).values), score.sum((1, 3)), rtol=1e-6, atol=1e-9)
        score = sign * (others["mlp_out", layer] - here["mlp_out", layer]) * coefficient["mlp_out", layer]
        torch.testing.assert_close(torch.tensor(places.sel(layer=layer).values), score.sum(2), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.tensor(results.values), torch.tensor(heads.values))


def test_the_last_mlp_is_scored_by_its_direct_effect_at_the_scale_of_the_base_run():
    model, task = make("llama")
    sites = ["mlp_out", "resid_post"]
    _, clean = model.run_with_cache(task.clean, sites)
    _, corrupted = model.run_with_cache(task.corrupted, sites)
    difference = (clean["mlp_out", 2] - corrupted["mlp_out", 2])[:, -1]
    scale = corrupted["resid_post", 2][:, -1].square().mean(-1, keepdim=True).add(1e-6).sqrt()
    head = model.hf.lm_head.weight[5] - model.hf.lm_head.weight[9]
    expected = (difference / scale * model.hf.model.norm.weight * head).sum(-1).detach()
    found = relevance_patching(model, task, site="mlp_out", normalised=False, per_prompt=True).sel(layer=2)
    torch.testing.assert_close(torch.tensor(found.values[:, -1]), expected, rtol=1e-5, atol=1e-7)
    assert (found.values[:, :-1] == 0).all()


def test_attrs_say_which_rules_and_dims_are_those_of_activation_patching():
    model, task = make("llama", torch.float32)
    exact = activation_patching(model, task, site="resid_pre")
    estimate = relevance_patching(model, task, site="resid_pre", rules="+ah", verify=4)
    assert estimate.dims == exact.dims
    assert estimate.shape == exact.shape
    assert estimate.attrs["method"] == "relevance_patching"
    assert estimate.attrs["rules"] == "relp+ah"
    assert estimate.attrs["verify_k"] == 4
    found = estimate["exact"].values
    assert (~torch.tensor(found).isnan()).sum() == 4
    known = ~torch.isnan(torch.tensor(found))
    torch.testing.assert_close(torch.tensor(found)[known], torch.tensor(exact.values)[known], rtol=1e-4, atol=1e-5)
    several = relevance_patching(model, task, site="resid_pre", rules=("ln", "half"))
    assert several.attrs["rules"] == "half+ln"


def test_without_rules_it_is_attribution_patching():
    model, task = make("gpt2", torch.float32)
    none = relevance_patching(model, task, site="mlp_post", by=("layer", "neuron"), rules=())
    plain = attribution_patching(model, task, site="mlp_post", by=("layer", "neuron"))
    assert (none.values == plain.values).all()


def test_what_cannot_be_asked_is_refused_before_any_run(monkeypatch):
    model, task = make("gpt_neo", torch.float32)
    before = state_of(model.hf)
    monkeypatch.setattr(model.hf, "forward", lambda *args, **kwargs: pytest.fail("a forward pass was run"))
    with pytest.raises(ValueError, match="no relevance rule or preset"):
        relevance_patching(model, task, site="z", rules="lrp")
    with pytest.raises(NotImplementedError, match="outside its AttentionInterface"):
        relevance_patching(model, task, site="z", rules="attnlrp")
    with pytest.raises(ValueError, match="no axis 'neuron'"):
        relevance_patching(model, task, site="z", by=("neuron",))
    monkeypatch.undo()
    assert state_of(model.hf) == before
