"""Every invariant of the sites, on a tiny random model of every family and each attention implementation.

Nothing is compared with what `interp` itself said before: the other side of each comparison is a run of transformers, a
formula written out here, or a module of the model applied by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

import interp
from interp.model import Edit, Site
from tests.model.case import Case, Stack, make_case, output_of, run_alone, state_of
from tests.model.families import FAMILIES
from tests.model.oracle import (
    allowed_keys,
    expected_pattern,
    expected_scores,
    rotary_gain,
    scale_of,
    spied_attention,
)

INSIDE_ATTENTION = ("rot_q", "rot_k", "attn_scores", "pattern")
CASES = [f"{family.name}/{implementation}" for family in FAMILIES.values() for implementation in family.implementations]
# float32 sums of a few dozen terms of order 1 in another order.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Matrices this small take a hundred times longer when several threads wait for each other on a busy machine."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


def layers_of(case: Case) -> Iterator[tuple[Stack, int]]:
    yield from ((stack, layer) for stack in case.stacks for layer in stack.layers)


def test_logits_equal(case: Case) -> None:
    """Logits with every site cached or hooked are `torch.equal` to those of transformers, and the model is left as it
    was."""
    next(case.hf.parameters()).requires_grad_(False)
    before = state_of(case.hf)
    weights = {name: tensor.clone() for name, tensor in case.hf.state_dict().items()}
    seen = []
    hooked = case.model.run_with_hooks(case.inputs, [("*", lambda activation, hook: seen.append(hook.name))])
    cached, _ = case.model.run_with_cache(case.inputs)
    assert torch.equal(case.logits, case.plain)
    assert torch.equal(cached, case.plain)
    assert torch.equal(hooked, case.plain)
    assert sorted(seen) == sorted(case.model.site_names())
    assert state_of(case.hf) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in case.hf.state_dict().items())
    assert torch.equal(output_of(case.hf, case.inputs), case.plain)
    with_kv_cache = output_of(case.hf, case.inputs, kv_cache=True)
    torch.testing.assert_close(case.plain, with_kv_cache, rtol=0, atol=5e-6)


def test_residual_sums(case: Case) -> None:
    """resid_pre + attn_out (+ mlp_out) = resid_post; between blocks the stream is the hidden state of transformers."""
    for stack, layer in layers_of(case):
        before_mlp = stack("resid_pre", layer) + stack("attn_out", layer)
        if stack.family.parallel:
            assert not stack.has("resid_mid")
        else:
            torch.testing.assert_close(stack("resid_mid", layer), before_mlp, **CLOSE)
            if stack.family.post_norm:
                before_mlp = stack("ln1", layer)
        torch.testing.assert_close(stack("resid_post", layer), before_mlp + stack("mlp_out", layer), **CLOSE)
        if layer + 1 < len(stack.blocks):
            handed_on = "ln2" if stack.family.post_norm else "resid_post"
            assert torch.equal(stack(handed_on, layer), stack("resid_pre", layer + 1))
    hidden = run_alone(case.hf, case.inputs, output_hidden_states=True).hidden_states
    assert torch.equal(case.cache["hook_embed"], case.text("resid_pre", 0))
    for layer in case.text.layers:
        assert torch.equal(case.text("resid_pre", layer), hidden[layer])


def test_norms(case: Case) -> None:
    """ln1, ln2 and ln_final are what the model's norms make of the stream before and after attention, and last."""
    for stack, layer in layers_of(case):
        streams = {"ln1": "resid_mid" if stack.family.post_norm else "resid_pre"}
        streams["ln2"] = (
            "resid_post" if stack.family.post_norm else "resid_pre" if stack.family.parallel else "resid_mid"
        )
        tower = case.model.anatomy.towers[stack.prefix].blocks[layer]
        for kind, stream in streams.items():
            if stack.has(kind):
                expected = getattr(tower, kind)(stack(stream, layer))
                torch.testing.assert_close(stack(kind, layer), expected, **CLOSE)
    ln_final = case.model.anatomy.text.ln_final
    if ln_final is not None and not case.family.pooled_norm:
        expected = ln_final(case.text("resid_post", case.text.layers[-1]))
        torch.testing.assert_close(case.cache["ln_final.hook_normalized"], expected, **CLOSE)


def test_head_results(case: Case) -> None:
    """sum_h result_h + b_O = attn_out, through the post-norm, layer scale or multiplier where there is one."""
    for stack, layer in layers_of(case):
        block = stack.blocks[layer]
        total = stack("result", layer).sum(-2)
        bias = block.get_submodule(stack.family.o).bias
        total = total if bias is None else total + bias
        if stack.family.attn_post:
            total = block.get_submodule(stack.family.attn_post)(total)
        expected = stack.family.residual_multiplier * total
        torch.testing.assert_close(stack("attn_out", layer), expected.detach(), **CLOSE)


def test_scores(case: Case) -> None:
    """rot_q · rot_k with scale, soft-cap and mask gives the scores; masked entries are exactly those of the config."""
    if not case.family.interface:
        pytest.skip("scores are outside transformers' attention interface")
    for stack, layer in layers_of(case):
        rot_q, rot_k, scores = (stack(kind, layer) for kind in ("rot_q", "rot_k", "attn_scores"))
        inputs = {} if stack.prefix else case.inputs
        allowed = allowed_keys(stack.config, stack.family, inputs, layer, rot_q.shape[1])
        assert torch.equal(torch.isneginf(scores), ~allowed.expand_as(scores))
        softcap = getattr(stack.config, "attn_logit_softcapping", None)
        scale = scale_of(stack.config, stack.family, layer)
        expected = expected_scores(rot_q, rot_k, scale=scale, softcap=softcap, allowed=allowed)
        torch.testing.assert_close(scores, expected, **CLOSE)


def test_pattern(case: Case) -> None:
    """softmax(scores) = pattern = the attentions that transformers returns; pattern @ v = z."""
    if not case.family.interface:
        pytest.skip("the pattern is outside transformers' attention interface")
    for stack, layer in layers_of(case):
        pattern = stack("pattern", layer)
        sinks = getattr(stack.blocks[layer].get_submodule(stack.family.attn), "sinks", None)
        expected = expected_pattern(stack("attn_scores", layer), None if sinks is None else sinks.detach())
        torch.testing.assert_close(pattern, expected, **CLOSE)
        if sinks is not None:
            assert (pattern.sum(-1) < 1).all()
        v = stack("v", layer)
        by_head = v.repeat_interleave(pattern.shape[1] // v.shape[2], dim=2)
        torch.testing.assert_close(stack("z", layer), torch.einsum("bhqk,bkhd->bqhd", pattern, by_head), **CLOSE)
    attentions = run_alone(case.family.make_model("eager"), case.inputs, output_attentions=True).attentions
    assert len(attentions) == len(case.text.blocks)
    for layer in case.text.layers:
        torch.testing.assert_close(case.text("pattern", layer), attentions[layer], **CLOSE)


def test_queries_keys_values(case: Case) -> None:
    """q, k, v and their rotated forms are those that transformers' own attention works on."""
    seen = spied_attention(case.family, case.hf.config._attn_implementation)
    paths = {module: path for path, module in case.hf.named_modules()}
    for stack, layer in layers_of(case):
        attn = stack.blocks[layer].get_submodule(stack.family.attn)
        spied = seen[paths[attn]]
        names = ("rot_q", "rot_k", "v") if stack.family.interface else ("q", "k", "v")
        for name, expected in zip(names, spied, strict=True):
            ours = stack(name, layer)
            repeated = ours.repeat_interleave(expected.shape[2] // ours.shape[2], dim=2)
            torch.testing.assert_close(repeated, expected, **CLOSE)
        if not stack.family.interface:
            continue
        for part, rotated, gain in zip("qk", spied, rotary_gain(case.hf, stack.config), strict=False):
            normed = normed_heads(stack, attn, part, stack(part, layer))
            # A rotation keeps lengths, and at position 0 it is the identity (PaliGemma counts from 1).
            torch.testing.assert_close(rotated.norm(dim=-1), gain * normed.norm(dim=-1), **CLOSE)
            if case.family.name != "paligemma":
                torch.testing.assert_close(rotated[:, 0], gain * normed[:, 0], **CLOSE)


@torch.no_grad()
def normed_heads(stack: Stack, attn: nn.Module, part: str, heads: Tensor) -> Tensor:
    """q or k after the family's QK-norm, [batch, pos, head, d_head]."""
    if stack.family.qk_norm is None:
        return heads
    norm = attn.get_submodule(stack.family.qk_norm["qk".index(part)])
    if stack.family.flat_qk_norm:
        return norm(heads.flatten(-2)).view_as(heads)
    if stack.config.model_type == "stablelm":
        return norm(heads.transpose(1, 2)).transpose(1, 2)
    return norm(heads)


def test_weights(case: Case) -> None:
    """W_Q, W_K, W_V with biases reproduce q, k, v from the attention input; W_O, b_O and W_out the outputs."""
    for stack, layer in layers_of(case):
        source = stack(stack.family.attn_input, layer)
        for part in "qkv":
            weight = stack.weights.of_block(f"W_{part.upper()}", layer)
            bias = stack.weights.of_block(f"b_{part.upper()}", layer)
            expected = torch.einsum("btm,hmd->bthd", source, weight) + bias
            torch.testing.assert_close(stack(part, layer), expected, **CLOSE)
        block = stack.blocks[layer]
        w_o, b_o = stack.weights.of_block("W_O", layer), stack.weights.of_block("b_O", layer)
        by_head = torch.einsum("bthd,hdm->bthm", stack("z", layer), w_o)
        torch.testing.assert_close(stack("result", layer), by_head, **CLOSE)
        added = torch.einsum("bthd,hdm->btm", stack("z", layer), w_o) + b_o
        if stack.family.attn_post:
            added = block.get_submodule(stack.family.attn_post)(added)
        torch.testing.assert_close(
            stack("attn_out", layer), (added * stack.family.residual_multiplier).detach(), **CLOSE
        )
        if stack.has("mlp_post"):
            out = stack("mlp_post", layer) @ stack.weights.of_block("W_out", layer)
            out = out + stack.weights.of_block("b_out", layer)
            if stack.family.mlp_post:
                out = block.get_submodule(stack.family.mlp_post)(out)
            torch.testing.assert_close(
                stack("mlp_out", layer), (out * stack.family.residual_multiplier).detach(), **CLOSE
            )


def test_neurons(case: Case) -> None:
    """mlp_post is the activation function of mlp_pre, times the linear branch of a gated MLP; mlp_pre comes from W."""
    if not case.text.has("mlp_post"):
        pytest.skip("each token of a mixture of experts has its own neurons")
    for stack, layer in layers_of(case):
        source = stack(mlp_input_of(stack), layer)
        linear = source @ stack.weights.of_block("W_in", layer) + stack.weights.of_block("b_in", layer)
        before, after = stack("mlp_pre", layer), stack("mlp_post", layer)
        try:
            gate = stack.weights.of_block("W_gate", layer)
        except interp.SiteUnavailable:
            torch.testing.assert_close(before, linear, **CLOSE)
            torch.testing.assert_close(after, activation_of(stack)(before), **CLOSE)
        else:
            # W_gate has no bias beside it (TransformerLens's names have none), so up to one constant a neuron.
            rest = before - source @ gate
            torch.testing.assert_close(rest, rest[:1, :1].expand_as(rest), **CLOSE)
            torch.testing.assert_close(after, activation_of(stack)(before) * linear, **CLOSE)


def mlp_input_of(stack: Stack) -> str:
    if stack.family.post_norm:
        return "ln1"
    if stack.has("ln2"):
        return "ln2"
    return "ln1" if stack.family.parallel else "resid_mid"


def activation_of(stack: Stack) -> nn.Module:
    """The activation function by its name in the config; BLOOM has its own, DINOv2 gates with SiLU."""
    config = stack.config
    if config.model_type == "bloom":
        return ACT2FN["gelu_pytorch_tanh"]
    if getattr(config, "use_swiglu_ffn", False):
        return ACT2FN["silu"]
    names = ("hidden_act", "hidden_activation", "activation_function", "activation")
    return ACT2FN[next(getattr(config, name) for name in names if hasattr(config, name))]


def edited_sites(case: Case) -> list[Site]:
    """Every kind of site in every tower, the layered ones in the middle layer."""
    return [site for site in case.model.site_names() if site.layer in (None, 1)]


def test_edits_with_own_value(case: Case) -> None:
    """Setting any site to its own cached value changes nothing.

    To the bit, except for scores and pattern: an edit there replaces SDPA by a softmax and a plain matrix product.
    """
    for site in edited_sites(case):
        with case.model.edited(Edit(site, value=case.cache[site])):
            again = case.model(case.inputs)
        tolerance = 5e-6 if site.kind in ("attn_scores", "pattern") else 0.0
        difference = (again - case.plain).abs().max()
        assert difference <= tolerance, f"{site}: its own value changed the output by {difference:.1e}"


def test_edits_reach_the_output(case: Case) -> None:
    """Changing any site changes the output: it is on the path, not beside it."""
    generator = torch.Generator().manual_seed(2)
    for site in edited_sites(case):
        facts = case.family.vision if site.tower else case.family
        if site.kind == "ln_final" and facts.pooled_norm:
            continue
        noise = torch.randn(case.cache[site].shape, generator=generator)
        with case.model.edited(Edit(site, fn=lambda activation, noise=noise: 1.5 * activation + noise)):
            changed = case.model(case.inputs)
        difference = (changed - case.plain).abs().max()
        assert difference > 1e-3, f"{site}: an edit changed the output by {difference:.1e} only"


def test_resid_mid_edit(case: Case) -> None:
    """A new resid_mid gives what the rest of the block, applied by hand, and the following blocks make of it."""
    if case.family.parallel:
        with pytest.raises(interp.SiteUnavailable, match=r"resid_mid.*parallel"):
            case.model.run_with_cache(case.inputs, "blocks.0.hook_resid_mid")
        return
    for stack in case.stacks:
        layer = 1
        value = torch.randn(stack("resid_mid", layer).shape, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            expected_out = stack.family.finish(stack.blocks[layer], value)

        def replace_output(module: nn.Module, args: Any, output: Any, new: Tensor = expected_out) -> Any:
            return (new, *output[1:]) if isinstance(output, tuple) else new.reshape(output.shape)

        handle = stack.blocks[layer].register_forward_hook(replace_output)
        expected = output_of(case.hf, case.inputs)
        handle.remove()
        with case.model.edited(Edit(Site("resid_mid", layer, tower=stack.prefix), value=value)):
            torch.testing.assert_close(case.model(case.inputs), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["z", "resid_mid"])
def test_gradients(case: Case, kind: str) -> None:
    """The gradient at a site is the finite difference of the output, in float64."""
    if kind == "resid_mid" and case.family.parallel:
        pytest.skip("attention and MLP run in parallel")
    hf = case.family.make_model(case.hf.config._attn_implementation, dtype=torch.float64)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in case.inputs.items()}
    model = interp.Model(hf)
    generator = torch.Generator().manual_seed(4)
    reader = torch.randn(case.plain.shape, generator=generator, dtype=torch.float64)
    site = Site(kind, 1)
    _, activations, gradients = model.run_with_gradients(inputs, lambda logits: (logits * reader).sum(), [site])
    direction = torch.randn(activations[site].shape, generator=generator, dtype=torch.float64)
    # Norms and softmax of several families run in float32 whatever the dtype: rounding bounds the step from below. The
    # kinks of a ReLU bound it from above.
    step = 1e-4 if case.family.has_kinks else 1e-3

    def at(factor: float) -> Tensor:
        with model.edited(Edit(site, add=factor * step * direction)):
            return (model(inputs) * reader).sum()

    expected = (at(1) - at(-1)) / (2 * step)
    torch.testing.assert_close((gradients[site] * direction).sum(), expected, rtol=5e-3, atol=5e-3)
    assert all(parameter.grad is None for parameter in hf.parameters())


def test_unavailable_sites(case: Case) -> None:
    """A site that the family cannot have raises an error that names it and says why."""
    missing = [*(() if case.family.interface else INSIDE_ATTENTION)]
    missing += ["mlp_pre", "mlp_post"] if case.family.experts else []
    missing += ["resid_mid"] if case.family.parallel else []
    for kind in missing:
        site = Site(kind, 1)
        assert site not in case.model.site_names()
        for ask in (site, kind):
            with pytest.raises(interp.SiteUnavailable) as raised:
                case.model.run_with_cache(case.inputs, ask)
            assert SITE_REASONS[kind] in str(raised.value)
            assert site.rpartition(".")[2] in str(raised.value)
    assert issubclass(interp.SiteUnavailable, ValueError)
    kinds = {site.kind for site in case.model.site_names() if site.tower == ""}
    assert set(ALWAYS) - set(missing) <= kinds, f"missing without a reason: {set(ALWAYS) - set(missing) - kinds}"


ALWAYS = (
    "embed", "resid_pre", "q", "k", "v", *INSIDE_ATTENTION, "z", "result", "attn_out", "resid_mid", "mlp_pre",
    "mlp_post", "mlp_out", "resid_post",
)  # fmt: skip
SITE_REASONS = {
    **dict.fromkeys(INSIDE_ATTENTION, "AttentionInterface"),
    **dict.fromkeys(("mlp_pre", "mlp_post"), "mixture of experts"),
    "resid_mid": "parallel",
}
