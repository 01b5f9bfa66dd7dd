"""The sweep engine against its slow twin: every family, every site, random variants of one or more edits."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import interp
from interp.model import Edit, Site
from interp.model.sites import LAYERLESS, SITE_DIMS
from interp.patching import Variant, sweep, sweep_activations
from interp.patching.packed_pass import PackedPass
from interp.patching.sweep import why_reference
from tests.model.families import FAMILIES

N_PROMPTS, LENGTH = 3, 9
FLOAT64_INSIDE = 1e-9
FLOAT32_INSIDE = 1e-6
"""For families whose norms or softmax round to float32, whatever the model's dtype."""
IMAGE_MODELS = ("vit", "dinov2", "dinov2-gated", "dinov2_with_registers", "clip")
TEXT = [
    f"{name}/{implementation}"
    for name, family in FAMILIES.items()
    if name not in IMAGE_MODELS
    for implementation in family.implementations
]
ROUNDS_INSIDE = ("llama", "mi", "qwen", "gemma", "olmo2", "phi3", "granite", "smollm3", "gpt_oss", "llava", "paligemma")


@cache
def case(name, dtype):
    """A tiny model, prompts, and the activations of other prompts to patch in."""
    family, _, implementation = name.partition("/")
    model = interp.Model(FAMILIES[family].make_model(implementation, dtype))
    tokens = torch.randint(3, 55, (2 * N_PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0))
    # Half of the other prompts share a beginning with theirs: patches there change nothing.
    tokens[N_PROMPTS : N_PROMPTS + 2, :4] = tokens[:2, :4]
    _, cache = model.run_with_cache(tokens[:N_PROMPTS])
    _, other = model.run_with_cache(tokens[N_PROMPTS:])
    return model, tokens[:N_PROMPTS], cache, other


INDEX = st.integers(0, 2**16)
SPEC = st.fixed_dictionaries(
    dict.fromkeys(("kind", "layer", "what"), INDEX)
    | {
        "positions": st.none() | st.lists(st.integers(-LENGTH, LENGTH - 1), min_size=1, max_size=3),
        "heads": st.none() | st.lists(INDEX, min_size=1, max_size=2),
        "keys": st.none() | st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=1),
        "neurons": st.none() | st.sampled_from([[0], [2, 1]]),
    }
)
"""One edit, as numbers: hypothesis draws no models, and what it draws applies to each of them."""
VARIANTS = st.lists(
    st.tuples(st.integers(0, N_PROMPTS - 1), st.lists(SPEC, max_size=3)),
    min_size=1,
    max_size=8,
)


def edit_of(spec, model, cache, other, prompt):
    kinds = sorted({site.kind for site in model.sites if not site.tower})
    kind = kinds[spec["kind"] % len(kinds)]
    site = Site(kind, None if kind in LAYERLESS else spec["layer"] % model.n_layers)
    dims = SITE_DIMS[kind]
    where = {"positions": spec["positions"]}
    if "head" in dims and spec["heads"]:
        where["heads"] = [head % model.n_heads_at(kind) for head in spec["heads"]]
    where["keys" if "key" in dims else "neurons"] = spec["keys" if "key" in dims else "neurons"]
    # -inf would leave a query with nothing to attend to, so scores come from the run itself.
    replacement = cache[site][prompt] * 1.5 if kind == "attn_scores" else other[site][prompt]
    whats = [
        {"value": replacement},
        {"value": 0.0},
        {"add": 0.3},
        {"scale": 1.7},
        {"fn": lambda activation: 0.9 * activation + activation.nan_to_num(0, 0, 0).mean() * 0.1},
        {"value": "mean"} if "position" in dims else {"scale": 0.5},
    ]
    return Edit(site, **where, **whats[spec["what"] % len(whats)])


def read(logits, prompt):
    return torch.cat([logits[:, :7], logits[:, :1] * prompt[:, None]], dim=1)


def compare(name, dtype, variants, batch_size, **options):
    model, tokens, _, _ = case(name, dtype)
    expected = sweep(model, tokens, variants, read, reference=True, **options)
    found = sweep(model, tokens, variants, read, batch_size=batch_size, **options)
    if dtype == torch.float64:
        tolerance = FLOAT32_INSIDE if name.startswith(ROUNDS_INSIDE) or name.endswith("eager") else FLOAT64_INSIDE
    else:
        tolerance = 1e-4
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", TEXT)
def test_the_engine_equals_the_reference_in_every_family(name):
    @settings(max_examples=3, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(
        drawn=VARIANTS,
        dtype=st.sampled_from([torch.float64, torch.float32]),
        batch_size=st.sampled_from([None, 1, 2]),
    )
    def check(drawn, dtype, batch_size):
        model, _, cache, other = case(name, dtype)
        variants = [
            Variant(prompt, tuple(edit_of(spec, model, cache, other, prompt) for spec in specs))
            for prompt, specs in drawn
        ]
        compare(name, dtype, variants, batch_size)

    check()


# What follows is about one small model.


@pytest.fixture
def llama():
    return case("llama/sdpa", torch.float64)


def patches(model, other, kind, positions=None, layers=None):
    return [
        Variant(prompt, (Edit(Site(kind, layer), value=other[kind, layer][prompt], positions=positions),))
        for prompt in range(N_PROMPTS)
        for layer in (range(model.n_layers) if layers is None else layers)
    ]


@pytest.mark.parametrize("name", ["llama/sdpa", "gpt2/eager", "gemma3_text/sdpa", "bert/sdpa", "mixtral/eager"])
def test_a_base_run_may_carry_edits_of_its_own(name):
    model, _, _, other = case(name, torch.float64)
    variants = [*patches(model, other, "z"), *patches(model, other, "resid_pre", [4]), Variant(1, ())]
    carried = [
        (
            Edit("blocks.0.hook_attn_out", add=0.1 * (1 + prompt)),
            Edit("blocks.1.attn.hook_z", value=other["z", 1][prompt] * 0.5, heads=[0]),
            Edit("blocks.2.attn.hook_k", scale=0.5, positions=[1]),
            Edit("blocks.2.attn.hook_pattern", scale=0.9, heads=[1]),
        )
        for prompt in range(N_PROMPTS)
    ]
    if name == "llama/sdpa":
        carried[1] += (Edit("blocks.1.hook_mlp_out", value="mean"),)
    compare(name, torch.float64, variants, None, base_edits=carried)
    plain = sweep(model, case(name, torch.float64)[1], variants, read)
    edited = sweep(model, case(name, torch.float64)[1], variants, read, base_edits=carried)
    assert (plain - edited).abs().max() > 1e-3


def test_columns_are_computed_alone_and_in_order(llama):
    model, tokens, _, other = llama
    columns = torch.tensor([7, 3, 50])
    variants = patches(model, other, "z")
    everything = sweep(model, tokens, variants, lambda logits, prompt: logits)
    found = sweep(model, tokens, variants, lambda logits, prompt: logits, columns=columns)
    assert found.shape == (len(variants), 3)
    torch.testing.assert_close(found, everything[:, columns], atol=1e-12, rtol=1e-12)
    assert "forward" not in vars(model.hf.lm_head)


def test_what_changes_nothing_is_not_run_and_gives_the_base_value_to_the_last_bit(llama, monkeypatch):
    model, tokens, cache, _ = llama
    monkeypatch.setattr(PackedPass, "through", None)
    variants = [Variant(0, ()), *patches(model, cache, "z"), *patches(model, cache, "attn_scores")]
    values = sweep(model, tokens, variants, read)
    base = values[0]
    for variant, value in zip(variants, values, strict=True):
        assert variant.prompt != 0 or torch.equal(value, base)


def test_a_later_edit_that_equals_the_base_run_still_counts(llama):
    """It takes back what an earlier edit has changed."""
    model, tokens, cache, other = llama
    change = Edit("blocks.0.hook_mlp_out", value=other["mlp_out", 0][0])
    back = Edit("blocks.2.hook_resid_pre", value=cache["resid_pre", 2][0])
    values = sweep(model, tokens, [Variant(0, (change,)), Variant(0, (change, back)), Variant(0, ())], read)
    assert (values[0] - values[2]).abs().max() > 1e-3
    torch.testing.assert_close(values[1], values[2], atol=1e-12, rtol=1e-12)


def test_rows_start_at_the_first_position_that_differs(llama, monkeypatch):
    """Prompts 0 and 1 share four tokens with the prompts that are patched in."""
    model, tokens, _, other = llama
    seen = []
    run = PackedPass.resid_final
    monkeypatch.setattr(
        PackedPass, "resid_final", lambda self, entries, on_rows: seen.extend(entries) or run(self, entries, on_rows)
    )
    sweep(model, tokens, patches(model, other, "resid_pre", layers=[0, 2]), read)
    assert {(entry.prompt, entry.layer, entry.start) for entry in seen} == {
        (prompt, layer, 0 if prompt == 2 else 4) for prompt in range(3) for layer in (0, 2)
    }


def test_out_of_memory_means_smaller_chunks(llama, monkeypatch, caplog):
    model, tokens, _, other = llama
    variants = patches(model, other, "z")
    expected = sweep(model, tokens, variants, read)
    run, fits = PackedPass.resid_final, 3

    def limited(self, entries, on_rows):
        if len(entries) > fits:
            raise torch.OutOfMemoryError("no room")
        return run(self, entries, on_rows)

    monkeypatch.setattr(PackedPass, "resid_final", limited)
    torch.testing.assert_close(sweep(model, tokens, variants, read), expected, atol=1e-12, rtol=1e-12)
    assert "out of memory with" in caplog.text
    fits = 0
    with pytest.raises(MemoryError, match=r"one variant of \d tokens does not fit"):
        sweep(model, tokens, variants, read)


def test_nan_names_the_edit(llama):
    model, tokens, _, _ = llama
    variant = Variant(1, (Edit("blocks.1.attn.hook_z", value=float("nan")),))
    with pytest.raises(FloatingPointError, match=r"prompt 1 with an edit at blocks.1.attn.hook_z"):
        sweep(model, tokens, [variant], read)


def test_activations_of_variants_equal_those_of_plain_runs(llama):
    model, tokens, _, other = llama
    variants = [*patches(model, other, "z"), Variant(0, ()), *patches(model, other, "resid_pre", [5])]
    for site in (Site("q", 2), Site("v", 1), Site("mlp_out", 1), Site("resid_post", 2), Site("rot_k", 0)):
        found = sweep_activations(model, tokens, variants, site)
        for variant, activation in zip(variants, found, strict=True):
            with model.edited(variant.edits):
                _, cache = model.run_with_cache(tokens[variant.prompt], site)
            torch.testing.assert_close(activation, cache[site][0], atol=1e-6, rtol=1e-6)
    with pytest.raises(NotImplementedError, match="position axis"):
        sweep_activations(model, tokens, variants, Site("pattern", 1))


def test_families_outside_the_interface_take_the_reference_way():
    model = interp.Model(FAMILIES["gptj"].make_model("eager"))
    assert "outside its AttentionInterface" in why_reference(model, [])
    tokens = torch.randint(3, 55, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    variants = [Variant(0, (Edit("blocks.1.attn.hook_z", value=0.0, heads=[0]),))]
    found = sweep(model, tokens, variants, read)
    torch.testing.assert_close(found, sweep(model, tokens, variants, read, reference=True))
    with pytest.raises(NotImplementedError, match="outside its AttentionInterface"):
        sweep_activations(model, tokens, variants, Site("q", 1))


def test_the_model_is_left_as_found_after_an_exception(llama, monkeypatch):
    model, tokens, _, other = llama

    def fail(logits, prompt):
        raise KeyboardInterrupt

    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.hf.modules()]
    with pytest.raises(KeyboardInterrupt):
        sweep(model, tokens, patches(model, other, "z"), fail)
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.hf.modules()]
    assert model.hf.config._attn_implementation == "sdpa"
    assert "forward" not in vars(model.hf.lm_head)
