"""Secant patching: scores that add up exactly, on every family, at every cut; gradients where nothing differs."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import interp
from interp.metrics import METRICS
from interp.model import Site
from interp.patching import activation_patching
from interp.patching.rules.secant_rules import kept_run, secant_rules
from interp.patching.secant import secant_metric, secant_patching
from interp.tasks import from_pairs
from tests.model.case import state_of
from tests.model.families import FAMILIES

FAMILY_NAMES = [name for name, family in FAMILIES.items() if family.interface and family.vision is None]
MIXTURES = [name for name in FAMILY_NAMES if FAMILIES[name].experts]
IN_FLOAT64 = 1e-6
"""Some norms and routers round to float32 inside, whatever the model's type."""


def inputs_of(family):
    """Clean and corrupted: two tokens differ, or some noise in the picture."""
    clean = family.make_inputs()
    if "input_ids" in clean:
        ids = clean["input_ids"].clone()
        ids[:, [3, 5]] = (ids[:, [3, 5]] + 9) % 50 + 5
        return clean, clean | {"input_ids": ids}
    noise = torch.randn(clean["pixel_values"].shape, generator=torch.Generator().manual_seed(3))
    return clean, clean | {"pixel_values": clean["pixel_values"] + 0.5 * noise}


def in_dtype(inputs, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def last(logits):
    return logits[:, -1] if logits.dim() == 3 else logits


def score(logits):
    return logits[:, 1] - logits[:, 2]


class Flows:
    """One pair of runs with every site tapped: Δa·m of each, element by element."""

    def __init__(self, model, clean, corrupted, score=score):
        sites = [site for site in model.sites if not site.tower and site.kind != "result"]
        with kept_run(model) as other:
            logits_other, others = model.run_with_cache(corrupted, sites)
        with secant_rules(model, other):
            values, here, self.multipliers = model.run_with_gradients(
                clean, lambda logits: secant_metric(score, last(logits), last(logits_other)), sites
            )
        self.here, self.others, self.values = here, others, values
        self.difference = values - score(last(logits_other))
        self.n_layers, self.sites = model.n_layers, sites
        self.elements = {site: ((here[site] - others[site]).nan_to_num() * self.multipliers[site]) for site in sites}

    def total(self, kind, layer=None):
        """Of each prompt."""
        return self.elements[Site(kind, layer)].flatten(1).sum(1)

    def heads(self, kind, layer):
        """[prompt, key/value head], query heads summed by group."""
        elements = self.elements[Site(kind, layer)]
        by_head = elements.sum((2, 3)) if kind in ("pattern", "attn_scores") else elements.sum((1, 3))
        n_groups = self.elements[Site("rot_k", layer)].shape[2]
        return by_head.unflatten(1, (n_groups, -1)).sum(2)

    def has(self, kind):
        return any(site.kind == kind for site in self.sites)


@cache
def flows(name, dtype):
    family = FAMILIES[name]
    model = interp.Model(family.make_model(family.implementations[-1], dtype))
    clean, corrupted = (in_dtype(one, dtype) for one in inputs_of(family))
    plain = score(last(model(clean)))
    return Flows(model, clean, corrupted), plain


def close(found, expected, dtype):
    atol = IN_FLOAT64 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=IN_FLOAT64 if dtype == torch.float64 else 1e-4, atol=atol)


BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
EVERY_FAMILY = pytest.mark.parametrize("name", FAMILY_NAMES)


@EVERY_FAMILY
@BOTH_DTYPES
def test_every_cut_of_the_model_carries_the_whole_difference(name, dtype):
    found, plain = flows(name, dtype)
    torch.testing.assert_close(found.values, plain, rtol=1e-5, atol=1e-5)
    assert float(found.difference.abs().min()) > 1e-3
    assert float((found.difference).abs().max()) < 10
    cuts = [Site("embed"), *(site for site in found.sites if site.kind in ("resid_pre", "resid_mid", "resid_post"))]
    for site in cuts:
        if site == Site("resid_post", found.n_layers - 1) and FAMILIES[name].pooled_norm:
            continue
        close(found.total(site.kind, site.layer), found.difference, dtype)


@EVERY_FAMILY
@BOTH_DTYPES
def test_what_flows_out_of_a_head_flows_into_its_query_key_and_value(name, dtype):
    found, _ = flows(name, dtype)
    for layer in range(found.n_layers):
        z, v = found.heads("z", layer), found.heads("v", layer)
        close(found.heads("rot_q", layer) + found.heads("rot_k", layer) + v, z, dtype)
        close(found.heads("pattern", layer) + v, z, dtype)
        close(found.heads("attn_scores", layer), found.heads("pattern", layer), dtype)
        # Norms of q and k, over one head or all of them, hand on everything that comes to them.
        for kind in ("q", "k"):
            close(found.total(kind, layer), found.total(f"rot_{kind}", layer), dtype)


def test_multipliers_of_a_block_equal_the_rules_written_out():
    """One Llama block in float64: from the multiplier behind it to the one before it, quotients and all."""
    found, _ = flows("llama", torch.float64)
    block = FAMILIES["llama"].make_model("eager", torch.float64).model.layers[1]
    c, r, m = found.here, found.others, found.multipliers

    def runs(kind):
        return c[kind, 1], r[kind, 1]

    def slope(kind, function):
        (a, b), (fa, fb) = runs(kind), (function(one) for one in runs(kind))
        same = (a - b).abs() < 1e-5
        middle = ((a + b) / 2).requires_grad_()
        (derivative,) = torch.autograd.grad(function(middle).sum(), middle)
        return torch.where(same, derivative, (fa - fb) / torch.where(same, 1.0, a - b))

    def norm(multiplier, module, kind):
        a, b = runs(kind)
        squares = [one.square().mean(-1, keepdim=True) for one in (a, b)]
        roots = [(one + module.variance_epsilon).rsqrt() for one in squares]
        same = (squares[0] - squares[1]).abs() < 1e-9
        rise = (roots[0] - roots[1]) / torch.where(same, 1.0, squares[0] - squares[1])
        rise = torch.where(same, -0.5 * (squares[0] + module.variance_epsilon) ** -1.5, rise)
        weighted, middle = multiplier * module.weight, (a + b) / 2
        return weighted * sum(roots) / 2 + (weighted * middle).sum(-1, keepdim=True) * rise * (2 / a.shape[-1]) * middle

    mlp = block.mlp
    up_c, up_r = (mlp.up_proj(one) for one in runs("ln2"))
    act_c, act_r = (nn.functional.silu(one) for one in runs("mlp_pre"))
    product = m["resid_post", 1] @ mlp.down_proj.weight
    torch.testing.assert_close(m["mlp_post", 1], product)
    gate = product * (up_c + up_r) / 2 * slope("mlp_pre", nn.functional.silu)
    torch.testing.assert_close(m["mlp_pre", 1], gate, rtol=1e-6, atol=1e-9)
    normed = gate @ mlp.gate_proj.weight + product * (act_c + act_r) / 2 @ mlp.up_proj.weight
    torch.testing.assert_close(m["ln2", 1], normed, rtol=1e-6, atol=1e-9)
    middle = m["resid_post", 1] + norm(normed, block.post_attention_layernorm, "resid_mid")
    torch.testing.assert_close(m["resid_mid", 1], middle, rtol=1e-5, atol=1e-7)

    attn = block.self_attn
    z = (middle @ attn.o_proj.weight).unflatten(-1, (4, 12))
    torch.testing.assert_close(m["z", 1], z, rtol=1e-6, atol=1e-9)
    (p_c, p_r), (s_c, s_r) = runs("pattern"), runs("attn_scores")
    v_mean = (sum(runs("v")) / 2).repeat_interleave(2, dim=2)
    pattern = torch.einsum("bqhd,bkhd->bhqk", z, v_mean)
    torch.testing.assert_close(m["pattern", 1], pattern, rtol=1e-6, atol=1e-9)
    v = torch.einsum("bhqk,bqhd->bkhd", (p_c + p_r) / 2, z).unflatten(2, (2, 2)).sum(3)
    torch.testing.assert_close(m["v", 1], v, rtol=1e-6, atol=1e-9)

    def log_mean(a, b):
        same = (a / b - 1).abs() < 1e-6
        return torch.where(same, (a + b) / 2, (a - b) / torch.where(same, 1.0, a.log() - b.log()))

    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    mean = torch.where(seen, log_mean(p_c.where(seen, 1.0), p_r.where(seen, 1.0)), 0.0)
    e_c, e_r = s_c.exp(), s_r.exp()
    share = torch.where(seen, log_mean(e_c.where(seen, 1.0), e_r.where(seen, 1.0)), 0.0)
    share = share / log_mean(e_c.sum(-1, keepdim=True), e_r.sum(-1, keepdim=True))
    scores = pattern * mean - share * (pattern * mean).sum(-1, keepdim=True)
    torch.testing.assert_close(m["attn_scores", 1], scores, rtol=1e-5, atol=1e-7)
    scaled = scores * 12**-0.5
    k_mean = (sum(runs("rot_k")) / 2).repeat_interleave(2, dim=2)
    torch.testing.assert_close(m["rot_q", 1], torch.einsum("bhqk,bkhd->bqhd", scaled, k_mean), rtol=1e-5, atol=1e-7)
    q_mean = sum(runs("rot_q")) / 2
    k = torch.einsum("bhqk,bqhd->bkhd", scaled, q_mean).unflatten(2, (2, 2)).sum(3)
    torch.testing.assert_close(m["rot_k", 1], k, rtol=1e-5, atol=1e-7)
    weights = {"q": attn.q_proj.weight, "k": attn.k_proj.weight, "v": attn.v_proj.weight}
    read = sum(m[kind, 1].flatten(2) @ weight for kind, weight in weights.items())
    torch.testing.assert_close(m["ln1", 1], read, rtol=1e-6, atol=1e-9)
    before = middle + norm(read, block.input_layernorm, "resid_pre")
    torch.testing.assert_close(m["resid_pre", 1], before, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_only_one_run_chose_are_in_the_sum(name, monkeypatch):
    import interp.patching.rules.secant_experts as module

    differing = []
    original = module._mixture

    def watch(experts, x, x_other, weights, weights_other):
        differing.append(int(((weights != 0) != (weights_other != 0)).sum()))
        return original(experts, x, x_other, weights, weights_other)

    monkeypatch.setattr(module, "_mixture", watch)
    family = FAMILIES[name]
    found = Flows(interp.Model(family.make_model()), *inputs_of(family))
    assert sum(differing) > 0
    close(found.total("embed"), found.difference, torch.float32)


@pytest.mark.parametrize(
    "name", [*MIXTURES, "llama", "gpt2", "gemma2", "gemma3_text", "olmo2", "opt", "bert", "roberta"]
)
def test_equal_prompts_have_the_plain_gradient_and_no_score(name):
    family = FAMILIES[name]
    model = interp.Model(family.make_model("eager", torch.float64))
    clean, _ = inputs_of(family)
    found = Flows(model, clean, clean)
    # Head results would be made of z anew; scores and pattern are on the path in both.
    _, _, gradients = model.run_with_gradients(clean, lambda logits: score(last(logits)), found.sites)
    for site in found.sites:
        assert bool((found.elements[site] == 0).all()), site
        torch.testing.assert_close(found.multipliers[site], gradients[site], rtol=1e-5, atol=1e-6, msg=str(site))


@pytest.mark.parametrize("name", ["prob_diff", "log_prob"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_metric_that_is_not_linear_is_explained_as_well(name, dtype):
    answers, wrong = torch.tensor([[3, 4], [5, -1]]), torch.tensor([[6], [7]])
    family = FAMILIES["gemma2"]
    model = interp.Model(family.make_model("eager", dtype))
    found = Flows(model, *inputs_of(family), lambda logits: METRICS[name](logits, answers, wrong))
    assert float(found.difference.abs().min()) > 1e-4
    close(found.total("resid_pre", 1), found.difference, dtype)


def test_a_linear_metric_keeps_its_gradient():
    logits, other = torch.randn(4, 1000).requires_grad_(), torch.randn(4, 1000)
    answers, wrong = torch.randint(500, (4, 2)), 500 + torch.randint(500, (4, 3))

    def metric(logits):
        return METRICS["logit_diff"](logits, answers, wrong)

    values = secant_metric(metric, logits, other)
    torch.testing.assert_close(values, metric(logits))
    (found,) = torch.autograd.grad(values.sum(), logits)
    (expected,) = torch.autograd.grad(metric(logits).sum(), logits)
    assert torch.equal(found, expected)


def test_a_run_can_be_repeated_against_the_same_kept_run():
    family = FAMILIES["qwen2_moe"]
    model = interp.Model(family.make_model())
    clean, corrupted = inputs_of(family)
    with kept_run(model) as other:
        model(corrupted)
    with secant_rules(model, other):
        runs = [model.run_with_gradients(clean, lambda logits: score(last(logits)), "resid_pre") for _ in range(2)]
    assert torch.equal(runs[0][2]["resid_pre", 0], runs[1][2]["resid_pre", 0])


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2_moe", "gemma2", "gpt_oss"])
def test_the_model_is_left_as_found(name):
    family = FAMILIES[name]
    hf = family.make_model()
    model = interp.Model(hf)
    before, plain = state_of(hf), model(family.make_inputs())
    clean, corrupted = inputs_of(family)
    Flows(model, clean, corrupted)
    assert state_of(hf) == before

    def fail(activation, hook):
        raise KeyboardInterrupt

    for wrong in (lambda: kept_run(model), lambda: secant_rules(model, other)):
        with kept_run(model) as other:
            model(corrupted)
        with pytest.raises(KeyboardInterrupt), wrong():
            model.run_with_hooks(clean, [("blocks.1.hook_resid_pre", fail)])
        assert state_of(hf) == before
    assert torch.equal(model(family.make_inputs()), plain)


def test_what_cannot_be_paired_is_refused():
    model = interp.Model(FAMILIES["llama"].make_model())
    with kept_run(model) as other:
        pass
    with secant_rules(model, other), pytest.raises(RuntimeError, match="inside kept_run first"):
        model(torch.arange(5, 10))
    with kept_run(model) as other:
        model(torch.arange(5, 10))
    with secant_rules(model, other), pytest.raises(ValueError, match=r"\(1, 4, 32\), in the kept run \(1, 5, 32\)"):
        model(torch.arange(5, 9))
    with (
        pytest.raises(NotImplementedError, match="attention of falcon outside its AttentionInterface"),
        kept_run(interp.Model(FAMILIES["falcon"].make_model())),
    ):
        pass


PAIRS = [
    ("When Mary and John went to the store, John gave a book to", "store, Mary", " Mary", " John"),
    ("When Tom and Alice went to the park, Alice gave a ring to", "park, Tom", " Tom", " Alice"),
    ("When Kate and Paul went to the office, Paul gave a drink to", "office, Kate", " Kate", " Paul"),
]


def pairs(model, prompts=PAIRS):
    described = []
    for clean, swapped, answer, wrong in prompts:
        place = swapped.partition(",")[0]
        rest = clean.partition(f"{place}, ")[2].partition(" ")[2]
        corrupted = clean.partition(f"{place}, ")[0] + f"{swapped} {rest}"
        described.append({"clean": clean, "corrupted": corrupted, "answer": answer, "wrong": wrong})
    return from_pairs(model, described)


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def task(model):
    return pairs(model)


@pytest.mark.parametrize(
    ("site", "by"),
    [
        ("resid_pre", ("layer", "position")),
        ("z", ("layer", "head")),
        ("result", ("layer", "head")),
        ("k", ("layer", "position", "head")),
        ("attn_scores", ("layer", "head")),
        ("pattern", ("layer", "head", "query")),
        ("mlp_post", ("layer", "neuron")),
        ("embed", ("position",)),
        ("mlp_out", ()),
    ],
)
def test_results_look_like_those_of_activation_patching(model, task, site, by):
    found = secant_patching(model, task[:2], site=site, by=by)
    exact = activation_patching(model, task[:2], site=site, by=by)
    assert found.dims == exact.dims
    assert found.shape == exact.shape
    assert set(found.coords) == set(exact.coords)
    assert found.attrs["method"] == "secant_patching"
    for name in ("site", "direction", "metric", "normalised", "metric_clean", "metric_corrupted", "seconds", "model"):
        assert name in found.attrs
    assert found.attrs["conservation_gap"] < 1e-5


def test_every_axis_of_a_pattern_can_be_kept(model, task):
    found = secant_patching(model, task, site="pattern", by=("layer", "head", "query", "key"))
    assert found.dims == ("layer", "head", "query", "key")
    heads = secant_patching(model, task, site="pattern", by=("layer", "head"))
    np.testing.assert_allclose(found.sum(("query", "key")).values, heads.values, atol=1e-5)
    assert bool((found.where(found["query"] < found["key"], 0) == 0).all())


def test_the_largest_scores_can_be_run_exactly(model, task):
    found = secant_patching(model, task, site="z", by=("layer", "head"), direction="noise", verify=2)
    exact = activation_patching(model, task, site="z", by=("layer", "head"), direction="noise")
    ran = found["exact"].notnull()
    assert int(ran.sum()) == 2
    np.testing.assert_allclose(found["exact"].where(ran, 0).values, exact.where(ran, 0).values, atol=1e-5)


def test_scores_of_each_layer_of_the_stream_add_up(model, task):
    found = secant_patching(model, task, site="resid_pre")
    np.testing.assert_allclose(found.sum("position").values, 1.0, atol=1e-4)
    per_prompt = secant_patching(model, task, site="resid_post", per_prompt=True, normalised=False)
    difference = [
        METRICS["logit_diff"](model(one)[:, -1], task.answers, task.wrong) for one in (task.clean, task.corrupted)
    ]
    expected = (difference[0] - difference[1]).numpy()[:, None].repeat(model.n_layers, 1)
    np.testing.assert_allclose(per_prompt.sum("position").values, expected, atol=1e-5)


def test_positions_before_the_first_difference_have_score_zero(model, task):
    first = int(task.first_difference.min())
    for site in ("resid_pre", "z", "mlp_out"):
        assert bool((secant_patching(model, task, site=site).isel(position=slice(0, first)) == 0).all())


def test_exchanging_the_two_runs_changes_the_sign_only(model, task):
    other_way = replace(
        task,
        clean_ids=task.corrupted_ids,
        corrupted_ids=task.clean_ids,
        clean_text=task.corrupted_text,
        corrupted_text=task.clean_text,
        str_tokens=task.corrupted_str_tokens,
        corrupted_str_tokens=task.str_tokens,
    )
    for site in ("z", "mlp_out", "k"):
        scores = [secant_patching(model, one, site=site, normalised=False).values for one in (task, other_way)]
        np.testing.assert_allclose(scores[0], -scores[1], atol=1e-6)


def test_direction_and_batches_do_not_matter(model, task):
    one = secant_patching(model, task, site="z", by=("layer", "position", "head"))
    for options in ({"direction": "noise"}, {"batch_size": 1}, {"batch_size": 2}):
        other = secant_patching(model, task, site="z", by=("layer", "position", "head"), **options)
        np.testing.assert_allclose(other.values, one.values, atol=1e-5)


def test_prompts_of_several_lengths(model):
    longer = ("When Mary and John went to the store, John gave a red book to", "store, Mary", " Mary", " John")
    task = pairs(model, [PAIRS[1], longer, PAIRS[2]])
    assert len(task.by_length()) == 2
    found = secant_patching(model, task, site="resid_pre", by=("layer",), per_prompt=True, normalised=False)
    for row in range(3):
        alone = secant_patching(model, task[[row]], site="resid_pre", by=("layer",), normalised=False)
        np.testing.assert_allclose(found.isel(prompt=row).values, alone.values, atol=1e-6)


def test_bad_requests_are_refused_before_any_run(model, task, monkeypatch):
    monkeypatch.setattr(model, "_forward", None)
    for options, message in (
        ({"site": "z", "by": ("layer", "neuron")}, "has no axis 'neuron'"),
        ({"site": "zz"}, "did you mean"),
        ({"site": "z", "metric": "accuracy"}, "no gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            secant_patching(model, task, **options)


def test_a_run_that_is_not_finite_names_the_first_site(model, task):
    with torch.no_grad():
        next(model.tower.blocks[1].mlp.parameters())[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"blocks\.1\.mlp"):
        secant_patching(model, task, site="z")


def test_frozen_parameters_and_bfloat16(model, task):
    expected = secant_patching(model, task, site="resid_pre")
    model.hf.requires_grad_(False)
    found = secant_patching(model, task, site="resid_pre")
    np.testing.assert_allclose(found.values, expected.values, atol=1e-6)
    model.hf.to(torch.bfloat16)
    rough = secant_patching(model, task, site="resid_pre")
    assert rough.attrs["dtype"] == "bfloat16"
    assert rough.values.dtype == np.float32
    np.testing.assert_allclose(rough.sum("position").values, 1.0, atol=0.2)
