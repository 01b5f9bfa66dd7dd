"""Activation patching: properties with a known answer, and every cell against a run written out by hand."""

import numpy as np
import pytest
import torch

from interp import Edit
from interp.metrics import bootstrap_interval, logit_diff
from interp.patching import Variant, activation_patching
from interp.patching.packed_pass import PackedPass
from interp.patching.reference import run_variants
from interp.tasks import from_pairs

PAIRS = [
    (
        "When Mary and John went to the store, John gave a book to",
        "When Mary and John went to the store, Mary gave a book to",
    ),
    (
        "When Tom and Alice went to the park, Alice gave a ring to",
        "When Tom and Alice went to the park, Tom gave a ring to",
    ),
    (
        "When Kate and Paul went to the office, Paul gave a drink to",
        "When Kate and Paul went to the office, Kate gave a drink to",
    ),
]
NAMES = [(" Mary", " John"), (" Tom", " Alice"), (" Kate", " Paul")]


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def task(model):
    return from_pairs(
        model,
        [
            {"clean": clean, "corrupted": corrupted, "answer": answer, "wrong": wrong}
            for (clean, corrupted), (answer, wrong) in zip(PAIRS, NAMES, strict=True)
        ],
    )


def score(model, task, tokens):
    return logit_diff(model(tokens)[:, -1], task.answers, task.wrong)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patching_a_whole_cut_of_the_model_moves_everything(model, task, direction):
    # All positions of the stream at one layer: what comes after is the other run.
    effects = activation_patching(model, task, site="resid_pre", by=("layer",), direction=direction)
    np.testing.assert_allclose(effects.values, 1.0, atol=1e-4)
    per_prompt = activation_patching(
        model, task, site="resid_post", by=("layer",), direction=direction, per_prompt=True
    )
    gaps = score(model, task, task.clean) - score(model, task, task.corrupted)
    np.testing.assert_allclose(per_prompt.sel(layer=1).values, (gaps / gaps.mean()).numpy(), atol=1e-4)


def test_positions_before_the_first_difference_have_no_effect_and_are_not_run(model, task, monkeypatch):
    first = int(task.first_difference.min())
    ran = []
    run = PackedPass.resid_final

    def counting(self, entries, on_rows):
        ran.extend(entries)
        return run(self, entries, on_rows)

    monkeypatch.setattr(PackedPass, "resid_final", counting)
    effects = activation_patching(model, task, site="resid_pre")
    assert (effects.isel(position=slice(0, first)) == 0).all()
    # Layer 0 sees the differing tokens only; later layers everything from the first of them on.
    differing = int((task.clean != task.corrupted).sum())
    later = sum(task.clean.shape[1] - int(one) for one in task.first_difference)
    assert len(ran) == differing + (model.n_layers - 1) * later


def test_a_patch_before_the_first_difference_really_changes_nothing(model, task):
    _, clean = model.run_with_cache(task.clean, "resid_pre")
    position = int(task.first_difference.min()) - 1
    variants = [
        Variant(prompt, (Edit("blocks.1.hook_resid_pre", value=clean["resid_pre", 1][prompt], positions=[position]),))
        for prompt in range(len(task))
    ]
    values = run_variants(model, task.corrupted, variants, lambda logits, prompt: logits)
    torch.testing.assert_close(values, model(task.corrupted)[:, -1], atol=1e-5, rtol=1e-5)


SITES = [
    ("resid_mid", ("layer", "position")),
    ("z", ("layer", "head")),
    ("k", ("layer", "position", "head")),
    ("rot_q", ("layer", "head")),
    ("attn_scores", ("layer", "head")),
    ("pattern", ("layer", "head", "query", "key")),
    ("mlp_post", ("layer", "neuron")),
    ("result", ("layer", "head")),
    ("embed", ("position",)),
    ("ln_final", ("position",)),
    ("z", ()),
    ("z", ("head",)),
]


@pytest.mark.parametrize(("site", "by"), SITES)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_each_cell_equals_a_hook_written_by_hand(model, task, site, by, direction):
    task = task[:2]
    effects = activation_patching(
        model, task, site=site, by=by, direction=direction, normalised=False, per_prompt=True, batch_size=3
    )
    base_tokens, source_tokens = (
        (task.corrupted, task.clean) if direction == "denoise" else (task.clean, task.corrupted)
    )
    _, source = model.run_with_cache(source_tokens, site)
    base = score(model, task, base_tokens)
    place = {axis: effects.sizes[axis] // 2 for axis in by}
    index = {
        "position": (slice(None), place.get("position", slice(None))),
        "head": {"z": 2, "k": 2, "rot_q": 2, "result": 2, "attn_scores": 1, "pattern": 1},
    }

    def patch(activation, hook):
        if "layer" in place and hook.site.layer != place["layer"]:
            return
        where = [slice(None)] * activation.dim()
        if "position" in place:
            where[1] = place["position"]
        if "head" in place:
            where[index["head"][site]] = place["head"]
        if "query" in place:
            where[2], where[3] = place["query"], place["key"]
        if "neuron" in place:
            where[-1] = place["neuron"]
        activation[tuple(where)] = source[hook.name][tuple(where)]

    patched = logit_diff(model.run_with_hooks(base_tokens, [(site, patch)])[:, -1], task.answers, task.wrong)
    expected = patched - base if direction == "denoise" else base - patched
    found = effects.isel(place).values
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_ablations_replace_by_zero_or_by_the_mean_over_prompts_and_positions(model, task, ablation):
    effects = activation_patching(
        model, task, site="z", by=("layer", "head"), direction="noise", ablation=ablation, normalised=False
    )
    _, clean = model.run_with_cache(task.clean, "z")
    value = clean["z", 1][:, :, 3].mean((0, 1)) if ablation == "mean" else 0.0
    with model.edited(Edit("blocks.1.attn.hook_z", heads=[3], value=value)):
        ablated = score(model, task, task.clean)
    expected = (score(model, task, task.clean) - ablated).mean()
    np.testing.assert_allclose(effects.sel(layer=1, head=3).item(), float(expected), atol=1e-5)


def test_results_do_not_depend_on_batching_and_average_over_prompts(model, task):
    options = {"site": "z", "by": ("layer", "head")}
    per_prompt = activation_patching(model, task, **options, per_prompt=True, batch_size=1)
    mean = activation_patching(model, task, **options, batch_size=7)
    np.testing.assert_allclose(per_prompt.mean("prompt"), mean, atol=1e-5)
    low, high = bootstrap_interval(per_prompt.values)
    assert ((low <= mean.values + 1e-6) & (mean.values <= high + 1e-6)).all()


def test_prompts_of_several_lengths_are_grouped_and_come_back_in_order(model, task):
    longer = (
        "Then , Mary and John went to the store, John gave a book to",
        "Then , Mary and John went to the store, Mary gave a book to",
    )
    pairs = [PAIRS[0], longer, PAIRS[1]]
    names = [NAMES[0], NAMES[0], NAMES[1]]
    mixed = from_pairs(
        model,
        [
            {"clean": clean, "corrupted": corrupted, "answer": answer, "wrong": wrong}
            for (clean, corrupted), (answer, wrong) in zip(pairs, names, strict=True)
        ],
    )
    assert len(mixed.by_length()) == 2
    options = {"site": "z", "by": ("layer", "head"), "normalised": False, "per_prompt": True}
    together = activation_patching(model, mixed, **options)
    for row in range(3):
        alone = activation_patching(model, mixed[[row]], **options)
        np.testing.assert_allclose(together.isel(prompt=row), alone.isel(prompt=0), atol=1e-5)
    with pytest.raises(ValueError, match="several lengths"):
        activation_patching(model, mixed, site="resid_pre", by=("layer", "position"))


def test_the_result_says_what_it_is(model, task, tmp_path):
    effects = activation_patching(model, task, site="blocks.1.hook_resid_pre")
    assert effects.dims == ("layer", "position")
    assert effects.layer.values.tolist() == [1]
    assert effects.token.values.tolist() == model.to_str_tokens(task.clean[0])
    wanted = {
        "model",
        "task",
        "metric",
        "method",
        "direction",
        "ablation",
        "seconds",
        "n_prompts",
        "torch",
        "interp",
        "model_dtype",
    }
    assert wanted <= set(effects.attrs)
    effects.to_netcdf(tmp_path / "effects.nc", engine="h5netcdf")
    assert effects.to_dataframe().shape[0] == effects.size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"site": "z", "by": ("layer", "neuron")},
            "site 'z' has no axis 'neuron' to keep; it has layer, position, head",
        ),
        ({"site": "embed", "by": ("layer",)}, "has no axis 'layer'"),
        ({"site": "z", "ablation": "zero"}, "use direction='noise'"),
        ({"site": "pattern", "by": ("head",), "ablation": "mean", "direction": "noise"}, "no mean over positions"),
        ({"site": "z", "metric": "logit_dif"}, "did you mean 'logit_diff'"),
        ({"site": "zz"}, "did you mean"),
        ({"site": "blocks.0.*"}, "one kind of site"),
    ],
)
def test_mistakes_are_named(model, task, options, message):
    with pytest.raises(ValueError, match=message):
        activation_patching(model, task, **options)


def test_nothing_to_be_a_share_of_is_an_error(model, task):
    def constant(logits, answers, wrong):
        return torch.zeros(len(logits))

    with pytest.raises(ValueError, match="nothing to be a share of"):
        activation_patching(model, task, site="z", by=("layer", "head"), metric=constant)


def test_not_finite_names_the_place(model, task):
    variants = [
        Variant(0, (Edit("blocks.0.attn.hook_z", value=0.0),)),
        Variant(1, (Edit("ln_final", value=float("inf")),)),
    ]
    with pytest.raises(FloatingPointError, match=r"prompt 1 with an edit at ln_final"):
        run_variants(model, task.clean, variants, lambda logits, prompt: logits)


def test_the_model_is_left_as_found(model, task):
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.hf.modules()]
    logits = model(task.clean)
    with pytest.raises(KeyboardInterrupt):
        run_variants(model, task.clean, [Variant(0, (Edit("z", fn=interrupt),))], lambda logits, prompt: logits)
    activation_patching(model, task, site="pattern", by=("layer", "head"))
    after = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.hf.modules()]
    assert before == after
    assert torch.equal(model(task.clean), logits)


def interrupt(activation):
    raise KeyboardInterrupt


def test_out_of_memory_means_smaller_batches_and_then_a_clear_error(model, task, monkeypatch):
    variants = [Variant(prompt, (Edit("z", value=0.0, heads=[head]),)) for prompt in range(3) for head in range(4)]
    expected = run_variants(model, task.clean, variants, lambda logits, prompt: logits)
    last_logits, most = model.last_logits, 5

    def limited(tokens):
        if len(tokens) > most:
            raise torch.OutOfMemoryError("no room")
        return last_logits(tokens)

    monkeypatch.setattr(model, "last_logits", limited)
    found = run_variants(model, task.clean, variants, lambda logits, prompt: logits)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    most = 0
    with pytest.raises(MemoryError, match=r"one prompt of 14 tokens does not fit"):
        run_variants(model, task.clean, variants, lambda logits, prompt: logits)
