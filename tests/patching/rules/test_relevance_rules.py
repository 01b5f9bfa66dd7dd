"""Relevance rules on whole models: same bits forward, the coefficients of the table backward, nothing left behind."""

import threading

import pytest
import torch

import interp
from interp.patching.rules.relevance import PRESETS, RULES, relevance_rules, rule_names
from tests.model.case import output_of, state_of
from tests.model.families import FAMILIES
from tests.patching.rules.by_hand import ByHand

SITES = ["resid_pre", "ln1", "q", "k", "v", "z", "attn_out", "resid_mid", "ln2", "mlp_pre", "mlp_post", "mlp_out"]
FLAGS = {
    "relp": {},
    "+ah": {"ah": True},
    "qk": {"query_key": 0.5},
    "attnlrp": {"query_key": 0.25, "value": 0.5},
    "cp-lrp": {"ah": True, "stop_gate": True},
}


def make(name, dtype=torch.float32, **changes):
    family = FAMILIES[name]
    if changes:
        family = type(family)(**(vars(family) | {"config": family.config | changes}))
    return interp.Model(family.make_model(family.implementations[-1], dtype)), family.make_inputs()


def score(logits):
    """A linear function of the output, one value a prompt."""
    weights = torch.randn(logits.shape[1:], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (logits * weights.to(logits)).flatten(1).sum(1)


def coefficients(model, inputs, rules, sites="*"):
    with relevance_rules(model, rules):
        return model.run_with_gradients(inputs, score, sites)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_forward_pass_has_the_same_bits(name):
    model, inputs = make(name)
    plain = output_of(model.hf, inputs)
    values, activations, gradients = model.run_with_gradients(inputs, score, "*")
    before = state_of(model.hf)
    for preset in PRESETS if FAMILIES[name].interface else ["relp"]:
        with relevance_rules(model, preset):
            assert torch.equal(output_of(model.hf, inputs), plain)
            new_values, new_activations, coefficient = model.run_with_gradients(inputs, score, "*")
        assert torch.equal(new_values, values)
        assert all(torch.equal(new_activations[site], activations[site]) for site in activations)
        assert any(not torch.equal(coefficient[site], gradients[site]) for site in gradients)
    assert state_of(model.hf) == before


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mixtral", "gpt_oss"])
def test_the_same_bits_in_bfloat16(name):
    model, inputs = make(name, torch.bfloat16)
    values, activations, _ = model.run_with_gradients(inputs, score, ["resid_pre", "mlp_out"])
    new_values, new_activations, coefficient = coefficients(model, inputs, "relp", ["resid_pre", "mlp_out"])
    assert torch.equal(new_values, values)
    assert all(torch.equal(new_activations[site], activations[site]) for site in activations)
    assert all(coefficient[site].isfinite().all() and coefficient[site].dtype == torch.bfloat16 for site in coefficient)


@pytest.mark.parametrize("preset", FLAGS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_coefficients_equal_those_of_a_forward_pass_written_by_hand(name, preset):
    model, inputs = make(name, torch.float64)
    values, _, found = coefficients(model, inputs, preset, SITES)
    hand = ByHand(**FLAGS[preset])
    expected_values = score(getattr(hand, name)(model.hf, inputs["input_ids"]))
    expected = torch.autograd.grad(expected_values.sum(), list(hand.sites.values()), allow_unused=True)
    torch.testing.assert_close(values, expected_values.detach(), rtol=1e-5, atol=1e-6)
    checked = set()
    for key, activation, coefficient in zip(hand.sites, hand.sites.values(), expected, strict=True):
        kind, layer = key.split(".")
        coefficient = torch.zeros_like(activation) if coefficient is None else coefficient
        # The norms of transformers round to float32 inside.
        torch.testing.assert_close(
            found[kind, int(layer)], coefficient, rtol=1e-5, atol=2e-6, msg=lambda m, k=key: k + m
        )
        checked.add(kind)
    assert checked == set(SITES) - ({"q", "k", "v"} if name == "gpt2" else set())


@pytest.mark.parametrize("rules", ["relp+ah", "cp-lrp"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"attention_bias": False, "mlp_bias": False}),
        ("llama-multi_query", {}),
        ("gemma", {"attention_bias": False}),
        ("gemma2", {"attention_bias": False, "final_logit_softcapping": None}),
        ("gemma3_text", {"attention_bias": False}),
        ("olmo2", {"attention_bias": False}),
        ("phi3", {}),
        ("cohere", {"attention_bias": False}),
        ("granite", {"attention_bias": False, "mlp_bias": False}),
    ],
)
def test_relevance_is_conserved_at_every_layer_without_biases(name, changes, rules):
    model, inputs = make(name, torch.float64, **changes)
    values, activations, coefficient = coefficients(model, inputs, rules, ["resid_pre", "ln_final", "embed"])
    for site in activations:
        relevance = (activations[site] * coefficient[site]).flatten(1).sum(1)
        torch.testing.assert_close(relevance, values, rtol=1e-4, atol=1e-4)


def test_grouped_keys_and_values_collect_from_all_query_heads_of_their_group():
    # One query head a key/value head, with the grouped weights repeated, is the same model.
    grouped, inputs = make("llama", torch.float64)
    config = type(grouped.hf.config)(**grouped.hf.config.to_dict() | {"num_key_value_heads": 4})
    full = type(grouped.hf)(config).to(torch.float64).eval()
    state = grouped.hf.state_dict()
    for name, value in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            state[name] = value.unflatten(0, (2, 12)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    for preset in ("relp", "qk", "attnlrp"):
        _, _, by_group = coefficients(grouped, inputs, preset, ["k", "v", "resid_pre"])
        _, _, by_head = coefficients(interp.Model(full), inputs, preset, ["k", "v", "resid_pre"])
        for layer in range(3):
            for kind in ("k", "v"):
                summed = by_head[kind, layer].unflatten(2, (2, 2)).sum(3)
                torch.testing.assert_close(by_group[kind, layer], summed, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(by_group["resid_pre", layer], by_head["resid_pre", layer], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.interface])
def test_a_constant_pattern_leaves_no_relevance_for_what_it_is_made_of(name):
    model, inputs = make(name)
    inside = ["rot_q", "rot_k", "attn_scores", "pattern"]
    _, _, plain = coefficients(model, inputs, "relp", inside)
    _, _, found = coefficients(model, inputs, "relp+ah", inside)
    assert all(not found[site].any() for site in found)
    assert all(plain[site].any() for site in plain if "pattern" in site)


@pytest.mark.parametrize("name", ["gemma3_text", "olmo2", "phi-qk_norm", "cohere-qk_norm", "stablelm-parallel_qk_norm"])
def test_norms_of_q_and_k_keep_their_derivative_unless_asked(name):
    model, inputs = make(name, torch.float64)
    _, _, frozen = coefficients(model, inputs, "qk", ["q", "rot_q"])
    _, activations, plain = coefficients(model, inputs, ("ln", "identity", "half", "half-qk"), ["q", "rot_q"])
    torch.testing.assert_close(frozen["rot_q", 2], plain["rot_q", 2])
    # The derivative of a norm has no component along its input; the LN-rule keeps it.
    axes = (-2, -1) if FAMILIES[name].flat_qk_norm else -1
    size = (activations["q", 2].abs() * plain["q", 2].abs()).sum()
    assert (activations["q", 2] * plain["q", 2]).sum(axes).abs().sum() < 1e-3 * size
    assert (activations["q", 2] * frozen["q", 2]).sum(axes).abs().sum() > 1e-2 * size


@pytest.mark.parametrize("name", ["gpt_neo", "gptj", "bloom", "falcon"])
@pytest.mark.parametrize("preset", ["relp+ah", "qk", "attnlrp", "cp-lrp"])
def test_rules_inside_attention_are_refused_where_no_hook_reaches_it(name, preset):
    model, _ = make(name)
    with pytest.raises(NotImplementedError, match=r"outside its AttentionInterface.*'relp'"):
        relevance_rules(model, preset)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_is_left_after_an_exception(preset, error):
    for name in ("llama", "gpt_oss"):
        model, inputs = make(name)
        model(inputs)
        before, attributes = state_of(model.hf), [sorted(vars(module)) for module in model.hf.modules()]

        def fail(logits, error=error):
            raise error("stop")

        with pytest.raises(error, match="stop"), relevance_rules(model, preset):
            model.run_with_gradients(inputs, fail, "z")
        assert state_of(model.hf) == before
        assert [sorted(vars(module)) for module in model.hf.modules()] == attributes


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "gpt_oss"])
def test_the_innermost_rules_hold(name):
    model, inputs = make(name)
    alone = {preset: coefficients(model, inputs, preset, "resid_pre")[2] for preset in PRESETS}
    plain = model.run_with_gradients(inputs, score, "resid_pre")[2]
    for outer in PRESETS:
        with relevance_rules(model, outer):
            with relevance_rules(model, "attnlrp"):
                inner = model.run_with_gradients(inputs, score, "resid_pre")[2]
            with relevance_rules(model, ()):
                none = model.run_with_gradients(inputs, score, "resid_pre")[2]
            after = model.run_with_gradients(inputs, score, "resid_pre")[2]
        for site in plain:
            assert torch.equal(inner[site], alone["attnlrp"][site])
            assert torch.equal(none[site], plain[site])
            assert torch.equal(after[site], alone[outer][site])


@pytest.mark.parametrize("site", ["ln1", "mlp_pre", "mlp_post", "mlp_out", "z"])
def test_edits_act_on_what_the_rules_hand_on_whichever_came_first(site):
    model, inputs = make("llama")
    edit = interp.Edit(site, value=0.0, positions=[2, 5])
    with model.edited(edit), relevance_rules(model):
        before = model.run_with_gradients(inputs, score, ["resid_pre", "mlp_post"])
    with relevance_rules(model), model.edited(edit):
        after = model.run_with_gradients(inputs, score, ["resid_pre", "mlp_post"])
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(before[2][name], after[2][name]) for name in before[2])


def test_contexts_may_end_in_any_order():
    model, inputs = make("gpt_oss")
    model(inputs)
    before = state_of(model.hf)
    attnlrp = coefficients(model, inputs, "attnlrp", "resid_pre")[2]
    outer, inner = relevance_rules(model, "relp"), relevance_rules(model, "attnlrp")
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    found = model.run_with_gradients(inputs, score, "resid_pre")[2]
    inner.__exit__(None, None, None)
    assert all(torch.equal(found[site], attnlrp[site]) for site in found)
    assert state_of(model.hf) == before
    assert all("_apply_gate" not in vars(module) for module in model.hf.modules())


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_rules_are_of_one_thread_and_one_model(name):
    model, inputs = make(name)
    other, _ = make(name)
    plain = model.run_with_gradients(inputs, score, "resid_pre")[2]
    found = {}

    def elsewhere():
        found["thread"] = model.run_with_gradients(inputs, score, "resid_pre")[2]

    with relevance_rules(model, "attnlrp"), relevance_rules(other):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        found["here"] = model.run_with_gradients(inputs, score, "resid_pre")[2]
    expected = {"thread": plain, "here": coefficients(model, inputs, "attnlrp", "resid_pre")[2]}
    for where, gradients in expected.items():
        assert all(torch.equal(found[where][site], gradients[site]) for site in gradients)


def test_choices_of_rules_are_checked():
    model, _ = make("llama")
    assert rule_names("+ah") == PRESETS["relp+ah"]
    assert rule_names("ln") == {"ln"}
    assert rule_names(PRESETS["qk"]) == PRESETS["qk"]
    assert set().union(*PRESETS.values()) == set(RULES)
    with pytest.raises(ValueError, match=r"'attn-lrp' is no relevance rule or preset; did you mean attnlrp"):
        relevance_rules(model, "attn-lrp")
    with pytest.raises(ValueError, match=r"'relp' is no relevance rule"):
        relevance_rules(model, ("relp", "ah"))
    with pytest.raises(ValueError, match=r"half and stop-gate say different things"):
        relevance_rules(model, ("half", "stop-gate"))
    with pytest.raises(ValueError, match=r"ah and half-qk say different things"):
        relevance_rules(model, ("ah", "half-qk"))


@pytest.mark.model
def test_relevance_is_conserved_on_smollm2(smollm2):
    tokens = smollm2.to_tokens("When Mary and John went to the store, John gave a drink to")
    with relevance_rules(smollm2, "+ah"):
        values, activations, coefficient = smollm2.run_with_gradients(
            tokens, lambda logits: logits[:, -1, 1000] - logits[:, -1, 2000], "resid_pre", logits_to_keep=1
        )
    totals = [float((activations[site] * coefficient[site]).sum()) for site in activations]
    assert totals == pytest.approx([float(values)] * smollm2.n_layers, rel=1e-4, abs=1e-3)
