"""Secant rules on live models: every cut of every family carries the whole difference; equal runs have gradients."""

from functools import cache

import pytest
import torch
from torch import nn

import interp
from interp.metrics import METRICS
from interp.model import Site
from interp.patching.rules.secant_rules import kept_run, secant_rules
from interp.patching.secant import secant_metric
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


class Block:
    """The middle block of a tiny Llama in float64, with everything that both runs and the backward pass had there."""

    def __init__(self):
        found, _ = flows("llama", torch.float64)
        self.here, self.others, self.multipliers = found.here, found.others, found.multipliers
        self.module = FAMILIES["llama"].make_model("eager", torch.float64).model.layers[1]

    def runs(self, kind):
        return self.here[kind, 1], self.others[kind, 1]

    def mean(self, kind):
        return sum(self.runs(kind)) / 2

    def m(self, kind):
        return self.multipliers[kind, 1]

    def slope(self, kind, function):
        (a, b), (fa, fb) = self.runs(kind), (function(one) for one in self.runs(kind))
        same = (a - b).abs() < 1e-5
        middle = ((a + b) / 2).requires_grad_()
        (derivative,) = torch.autograd.grad(function(middle).sum(), middle)
        return torch.where(same, derivative, (fa - fb) / torch.where(same, 1.0, a - b))

    def through_norm(self, multiplier, norm, kind):
        squares = [one.square().mean(-1, keepdim=True) for one in self.runs(kind)]
        roots = [(one + norm.variance_epsilon).rsqrt() for one in squares]
        same = (squares[0] - squares[1]).abs() < 1e-9
        rise = (roots[0] - roots[1]) / torch.where(same, 1.0, squares[0] - squares[1])
        rise = torch.where(same, -0.5 * (squares[0] + norm.variance_epsilon) ** -1.5, rise)
        weighted, middle = multiplier * norm.weight, self.mean(kind)
        along = (weighted * middle).sum(-1, keepdim=True)
        return weighted * sum(roots) / 2 + along * rise * (2 / middle.shape[-1]) * middle


def log_mean(a, b):
    same = (a / b - 1).abs() < 1e-6
    return torch.where(same, (a + b) / 2, (a - b) / torch.where(same, 1.0, a.log() - b.log()))


def equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_multipliers_of_an_mlp_equal_the_rules_written_out():
    """From the multiplier behind it to the one before it, quotients and all."""
    block = Block()
    mlp, silu = block.module.mlp, nn.functional.silu
    up = sum(mlp.up_proj(one) for one in block.runs("ln2")) / 2
    act = sum(silu(one) for one in block.runs("mlp_pre")) / 2
    product = block.m("resid_post") @ mlp.down_proj.weight
    equal(block.m("mlp_post"), product)
    gate = product * up * block.slope("mlp_pre", silu)
    equal(block.m("mlp_pre"), gate)
    normed = gate @ mlp.gate_proj.weight + product * act @ mlp.up_proj.weight
    equal(block.m("ln2"), normed)
    through = block.through_norm(normed, block.module.post_attention_layernorm, "resid_mid")
    equal(block.m("resid_mid"), block.m("resid_post") + through)


def test_multipliers_of_attention_equal_the_rules_written_out():
    block = Block()
    attn = block.module.self_attn
    z = (block.m("resid_mid") @ attn.o_proj.weight).unflatten(-1, (4, 12))
    equal(block.m("z"), z)
    pattern = torch.einsum("bqhd,bkhd->bhqk", z, block.mean("v").repeat_interleave(2, dim=2))
    equal(block.m("pattern"), pattern)
    equal(block.m("v"), torch.einsum("bhqk,bqhd->bkhd", block.mean("pattern"), z).unflatten(2, (2, 2)).sum(3))

    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    p, e = block.runs("pattern"), [one.exp() for one in block.runs("attn_scores")]
    mean = torch.where(seen, log_mean(*(one.where(seen, 1.0) for one in p)), 0.0)
    share = torch.where(seen, log_mean(*(one.where(seen, 1.0) for one in e)), 0.0)
    share = share / log_mean(*(one.sum(-1, keepdim=True) for one in e))
    scores = pattern * mean - share * (pattern * mean).sum(-1, keepdim=True)
    equal(block.m("attn_scores"), scores)
    scaled = scores * 12**-0.5
    equal(block.m("rot_q"), torch.einsum("bhqk,bkhd->bqhd", scaled, block.mean("rot_k").repeat_interleave(2, dim=2)))
    equal(block.m("rot_k"), torch.einsum("bhqk,bqhd->bkhd", scaled, block.mean("rot_q")).unflatten(2, (2, 2)).sum(3))

    weights = {"q": attn.q_proj.weight, "k": attn.k_proj.weight, "v": attn.v_proj.weight}
    read = sum(block.m(kind).flatten(2) @ weight for kind, weight in weights.items())
    equal(block.m("ln1"), read)
    through = block.through_norm(read, block.module.input_layernorm, "resid_pre")
    equal(block.m("resid_pre"), block.m("resid_mid") + through)


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


def test_experts_that_clamp_their_gate_and_its_factor():
    family = FAMILIES["gpt_oss"]
    hf = family.make_model("eager", torch.float64)
    for layer in hf.model.layers:
        layer.mlp.experts.limit = 0.3
    found = Flows(interp.Model(hf), *inputs_of(family))
    close(found.total("embed"), found.difference, torch.float64)


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
