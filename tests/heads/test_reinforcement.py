"""Reinforcement of heads against separate runs with plain edits, and the order that it must bring about on SmolLM2."""

import math
from contextlib import ExitStack

import numpy as np
import pytest
import torch
import xarray as xr

import interp
from interp import Edit, heads
from interp.heads.reinforcement import default_layers
from tests.model.families import FAMILIES
from tests.model.family import IMAGE_TOKEN

FULL = ["Mary and John went to the store", "Tom had a lot of fun at the park and", "the boy reads his book"]
ABLATED = ["the store", "fun at the park and", "his book"]


def scaled(model: interp.Model, chosen: np.ndarray, layers, alpha: float) -> ExitStack:
    """Plain edits that scale the heads chosen so far, those of each prompt in its own row."""
    stack = ExitStack()
    for layer in layers:
        for row, by_head in enumerate(chosen[:, layer]):
            if by_head.any():
                edit = Edit(
                    f"blocks.{layer}.attn.hook_z", heads=np.flatnonzero(by_head).tolist(), rows=[row], scale=alpha
                )
                stack.enter_context(model.edited(edit))
    return stack


def slow_twin(model, full, ablated, layers, *, alpha, outliers, scale_text_branch, per_prompt) -> np.ndarray:
    """Layer by layer: both inputs run anew, with the heads of the layers before scaled. [prompt, layer, head]"""
    n_prompts = len(model(full))
    chosen = np.zeros((n_prompts, model.n_layers, model.n_heads), dtype=bool)
    for layer in layers:
        z = []
        for prompts, alpha_here in ((full, alpha), (ablated, alpha if scale_text_branch else 1.0)):
            with scaled(model, chosen, range(layer), alpha_here):
                _, cache = model.run_with_cache(prompts, f"blocks.{layer}.attn.hook_z")
            z.append(cache["z", layer][:, -1].double().numpy())
        vhd, activation = np.linalg.norm(z[0] - z[1], axis=-1), (z[1] ** 2).sum(-1)
        if not per_prompt:
            vhd, activation = (np.tile(values.mean(0), (n_prompts, 1)) for values in (vhd, activation))
        for row in range(n_prompts):
            values = vhd[row].copy()
            if outliers:
                high = [one > one.mean() + one.std(ddof=1) for one in (vhd[row], activation[row])]
                values[high[0] & high[1]] = 0
            chosen[row, layer] = values > np.sort(values)[(len(values) - 1) // 2]
    return chosen


def hooks_of(model: interp.Model) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.hf.modules())


@pytest.mark.parametrize("per_prompt", [False, True])
@pytest.mark.parametrize(
    ("layers", "options"),
    [
        (None, {}),
        ([0, 1, 2], {"alpha": 3.0, "scale_text_branch": False}),
        ([0, -1], {"alpha": 0.5, "outliers": False}),
        ([1], {}),
    ],
)
def test_one_pass_in_lockstep_equals_runs_layer_by_layer(tiny, layers, options, per_prompt) -> None:
    options = {"alpha": 2.0, "outliers": True, "scale_text_branch": True, "per_prompt": per_prompt, **options}
    found = heads.reinforced_heads(tiny, FULL, ABLATED, layers=layers, **options)
    inside = sorted({layer % 3 for layer in ([1, 2] if layers is None else layers)})
    expected = slow_twin(tiny, FULL, ABLATED, inside, **options)
    np.testing.assert_array_equal(found, expected if per_prompt else expected[0])
    assert found.dims == (("prompt",) if per_prompt else ()) + ("layer", "head")
    assert found.dtype == bool
    assert found.attrs["layers"] == inside
    assert hooks_of(tiny) == 0


def test_earlier_layers_matter_to_later_ones(tiny_llama) -> None:
    """What layer by layer is for: on these prompts the choice from plain runs is another one."""
    options = {"layers": [0, 1, 2], "alpha": 3.0, "per_prompt": True}
    found = heads.reinforced_heads(tiny_llama, FULL, ABLATED, **options)
    static = heads.reinforced_heads(tiny_llama, FULL, ABLATED, layerwise=False, **options)
    np.testing.assert_array_equal(found[:, 0], static[:, 0])
    assert (found != static).any()
    expected = heads.select_heads(heads.divergence(tiny_llama, FULL, ABLATED, per_prompt=True))
    np.testing.assert_array_equal(static, expected)
    in_one = heads.reinforced_heads(tiny_llama, FULL, ABLATED, layerwise=False, layers=[2])
    np.testing.assert_array_equal(in_one[2], heads.select_heads(heads.divergence(tiny_llama, FULL, ABLATED))[2])
    assert not in_one[:2].any()


def test_a_batch_is_each_prompt_alone(tiny) -> None:
    together = heads.reinforced_heads(tiny, FULL, ABLATED, per_prompt=True)
    with heads.reinforced(tiny, together):
        logits = tiny(FULL)[:, -1]
    for row, (full, ablated) in enumerate(zip(FULL, ABLATED, strict=True)):
        alone = heads.reinforced_heads(tiny, full, ablated)
        np.testing.assert_array_equal(alone, together[row])
        with heads.reinforced(tiny, alone):
            torch.testing.assert_close(tiny(full)[0, -1], logits[row], atol=1e-5, rtol=1e-5)


def test_edits_in_force_act_on_both_branches_once(tiny) -> None:
    """Also one that adds to the very input of the first block, which the second branch runs twice."""
    edits = [Edit("blocks.0.hook_resid_pre", add=0.5), Edit("blocks.1.attn.hook_z", heads=[0], value=0.3)]
    options = {"alpha": 2.0, "outliers": True, "scale_text_branch": True, "per_prompt": True}
    with tiny.edited(edits):
        found = heads.reinforced_heads(tiny, FULL, ABLATED, layers=[0, 1, 2], **options)
        expected = slow_twin(tiny, FULL, ABLATED, [0, 1, 2], **options)
    np.testing.assert_array_equal(found, expected)
    assert (found != heads.reinforced_heads(tiny, FULL, ABLATED, layers=[0, 1, 2], **options)).any()


def test_reinforced_scales_z_of_the_chosen_heads_only(tiny) -> None:
    selection = torch.zeros(tiny.n_layers, tiny.n_heads, dtype=torch.bool)
    selection[0, [1, 3]] = selection[2, 0] = True
    tokens = tiny.to_tokens(FULL[0])
    _, plain = tiny.run_with_cache(tokens, "z")
    by_hand = [
        Edit("blocks.0.attn.hook_z", heads=[1, 3], scale=2.5),
        Edit("blocks.2.attn.hook_z", heads=[0], scale=2.5),
    ]
    with tiny.edited(by_hand):
        expected = tiny(tokens)
    with heads.reinforced(tiny, selection, 2.5):
        logits, cache = tiny.run_with_cache(tokens, "z")
    assert torch.equal(logits, expected)
    assert torch.equal(cache["z", 0][:, :, [1, 3]], 2.5 * plain["z", 0][:, :, [1, 3]])
    assert torch.equal(cache["z", 0][:, :, [0, 2]], plain["z", 0][:, :, [0, 2]])
    labelled = xr.DataArray(selection.T.numpy(), dims=("head", "layer"))
    with heads.reinforced(tiny, labelled, 2.5):
        assert torch.equal(tiny(tokens), expected)


def test_alpha_one_changes_nothing_and_the_model_is_left_as_found(tiny) -> None:
    everything = torch.ones(tiny.n_layers, tiny.n_heads, dtype=torch.bool)
    before = tiny(FULL)
    with heads.reinforced(tiny, everything, alpha=1.0):
        assert torch.equal(tiny(FULL), before)
    with pytest.raises(KeyError), heads.reinforced(tiny, everything):
        raise KeyError
    assert hooks_of(tiny) == 0
    assert torch.equal(tiny(FULL), before)


def test_a_failure_in_the_second_branch_leaves_the_model_as_found(tiny, monkeypatch) -> None:
    def fail(*args, **options):
        raise MemoryError

    monkeypatch.setattr("interp.heads.reinforcement.above_median", fail)
    with pytest.raises(MemoryError):
        heads.reinforced_heads(tiny, FULL, ABLATED)
    assert hooks_of(tiny) == 0


@pytest.mark.parametrize("per_prompt", [False, True])
def test_generation_with_a_cache_equals_whole_runs_token_by_token(tiny, per_prompt) -> None:
    tokens = torch.stack([tiny.to_tokens(text)[0, :6] for text in FULL[:2]])
    selection = heads.reinforced_heads(tiny, tokens, tokens[:, 3:], per_prompt=per_prompt)
    expected = tokens
    with heads.reinforced(tiny, selection, alpha=4.0):
        found = tiny.generate(tokens, max_new_tokens=5, min_new_tokens=5)
        for _ in range(5):
            logits = tiny(expected)[:, -1].clone()
            logits[:, tiny.hf.config.eos_token_id] = -torch.inf
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, expected)
    assert not torch.equal(found, tiny.generate(tokens, max_new_tokens=5, min_new_tokens=5))


def test_a_scaled_head_turns_the_stream_towards_itself() -> None:
    """cos(x + (α − 1) y, y) > cos(x, y) for α > 1 unless y is parallel to x: the proposition behind reinforcement."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1000, 16, dtype=torch.float64, generator=generator)
    for alpha in (1.01, 2.0, 10.0):
        turned = torch.cosine_similarity(x + (alpha - 1) * y, y)
        assert bool((turned > torch.cosine_similarity(x, y)).all())
    torch.testing.assert_close(torch.cosine_similarity(2 * y + y, y), torch.ones(1000, dtype=torch.float64))


def test_scaling_a_head_turns_the_attention_output_towards_it(tiny_llama) -> None:
    """The same in a model, where x is the stream after attention and y the result of the head."""
    site, head = "blocks.1.hook_resid_mid", 2
    _, plain = tiny_llama.run_with_cache(FULL[0], [site, "result"])
    selection = torch.zeros(tiny_llama.n_layers, tiny_llama.n_heads, dtype=torch.bool)
    selection[1, head] = True
    with heads.reinforced(tiny_llama, selection):
        _, turned = tiny_llama.run_with_cache(FULL[0], site)
    result = plain["result", 1][:, :, head]
    before, after = (torch.cosine_similarity(cache[site], result, dim=-1) for cache in (plain, turned))
    assert bool((after > before).all())


@pytest.mark.parametrize("n_layers", [1, 2, 3, 12, 30, 32])
def test_default_layers(n_layers) -> None:
    layers = default_layers(n_layers)
    expected = {
        1: [0],
        2: [1],
        3: [1, 2],
        12: [1, *range(6, 12)],
        30: [1, *range(16, 30)],
        32: [1, *range(18, 32)],
    }
    assert layers == expected[n_layers]


def test_mistakes_are_named_before_any_run(tiny, monkeypatch) -> None:
    monkeypatch.setattr(tiny.hf, "forward", lambda *args, **options: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="full has 3 prompts and ablated 2"):
        heads.reinforced_heads(tiny, FULL, ABLATED[:2])
    with pytest.raises(ValueError, match=r"layer 3 is out of range; layers run 0\.\.2"):
        heads.reinforced_heads(tiny, FULL, ABLATED, layers=[3])
    with pytest.raises(ValueError, match="layers is empty"):
        heads.reinforced_heads(tiny, FULL, ABLATED, layers=[])
    with pytest.raises(ValueError, match="alpha=nan; it is a finite factor"):
        heads.reinforced_heads(tiny, FULL, ABLATED, alpha=math.nan)
    too_few, numbers = torch.ones(2, 4, dtype=torch.bool), xr.DataArray(np.ones((3, 4)), dims=("layer", "head"))
    wanted = r"a selection is boolean, \[layer, head\] = \[3, 4\]"
    with pytest.raises(ValueError, match=wanted), heads.reinforced(tiny, too_few):
        pass
    with pytest.raises(ValueError, match=r"got torch.float64 \[3, 4\]"), heads.reinforced(tiny, numbers):
        pass


# Models that see


def without_image(full: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same prompts with the image tokens taken out, and nothing of the pixels left."""
    ids = full["input_ids"]
    kept = ids != IMAGE_TOKEN
    return {name: value[kept].view(len(ids), -1) for name, value in full.items() if value.shape == ids.shape}


@pytest.mark.parametrize("name", ["llava", "paligemma", "qwen2_vl"])
def test_models_that_see_with_and_without_the_image(name) -> None:
    family = FAMILIES[name]
    model, full = interp.Model(family.make_model()), family.make_inputs()
    ablated = without_image(full)
    vhd = heads.divergence(model, full, ablated, per_prompt=True)
    assert vhd.shape == (len(full["input_ids"]), model.n_layers, model.n_heads)
    assert (vhd[:, -1] > 0).all()
    _, cache = model.run_with_cache(full, "z")
    _, without = model.run_with_cache(ablated, "z")
    expected = (cache.stack("z")[:, :, -1] - without.stack("z")[:, :, -1]).norm(dim=-1).transpose(0, 1)
    np.testing.assert_allclose(vhd, expected, rtol=1e-4, atol=1e-5)

    options = {"alpha": 2.0, "outliers": True, "scale_text_branch": True, "per_prompt": True}
    # Not layer 0: from there the window of the tiny Qwen2-VL does not reach back to the image.
    selection = heads.reinforced_heads(model, full, ablated, layers=[1, 2], **options)
    np.testing.assert_array_equal(selection, slow_twin(model, full, ablated, [1, 2], **options))
    before = model(full)
    with heads.reinforced(model, selection):
        assert not torch.allclose(model(full), before, atol=1e-3)
        generated = model.generate(full, max_new_tokens=3)
        first = model(full)[:, -1].argmax(-1)
    assert torch.equal(generated[:, full["input_ids"].shape[1]], first)
    assert torch.equal(model(full), before)


# SmolLM2: the context sentence stands where the image would

CONTEXT = "{name} walked home in the rain. Inside the old leather bag there was a {thing}. "
QUESTION = "When {name} opened the bag, the only thing in it was a"
NAMES = ("Mary", "John", "Tom", "James", "Alice", "Bob", "Anna", "Paul", "Mark", "Sarah", "Jack", "Dan")
THINGS = ("key", "book", "knife", "camera", "banana", "coin", "radio", "pen", "phone", "letter", "bottle", "hat")
LAYERS = [1, *range(16, 30)]


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_answers_from_the_context_more_surely_with_its_heads_reinforced(smollm2) -> None:
    """Reinforced > plain > random heads; the other half and weakened heads hurt, scaling in all layers collapses.

    Heads are selected from plain runs. Mean log p(answer): with context -0.72, without -5.61; reinforced -0.25, random
    heads -0.90 (-2.11 to -0.30), the other half -0.97, weakened -1.55, in all layers -6.43; selected layer by layer and
    scaled by 1.5, -0.35.
    """
    ablated = [QUESTION.format(name=name) for name in NAMES]
    contexts = [CONTEXT.format(name=name, thing=thing) for name, thing in zip(NAMES, THINGS, strict=True)]
    full = [context + question for context, question in zip(contexts, ablated, strict=True)]
    assert [heads.without_segment(one, context) for one, context in zip(full, contexts, strict=True)] == ablated
    answers = torch.tensor([smollm2.to_single_token(f" {thing}") for thing in THINGS])

    def log_p(selection: torch.Tensor | None = None, alpha: float = 2.0, prompts: list[str] = full) -> float:
        with heads.reinforced(smollm2, torch.zeros(30, 9, dtype=torch.bool) if selection is None else selection, alpha):
            logits = smollm2(prompts, logits_to_keep=1)[:, -1]
        return float(logits.log_softmax(-1)[torch.arange(len(full)), answers].mean())

    everywhere = torch.from_numpy(heads.select_heads(heads.divergence(smollm2, full, ablated)).values)
    assert default_layers(30) == LAYERS
    inside = torch.zeros(30, 1, dtype=torch.bool)
    inside[LAYERS] = True
    generator = torch.Generator().manual_seed(0)
    ranks = torch.rand(5, 30, 9, generator=generator).argsort(-1).argsort(-1)
    layerwise = heads.reinforced_heads(smollm2, full, ablated, alpha=1.5)
    found = {
        "with context": log_p(),
        "without context": log_p(prompts=ablated),
        "reinforced": log_p(everywhere & inside),
        "the other half": log_p(~everywhere & inside),
        "weakened": log_p(everywhere & inside, alpha=0.5),
        "in all layers": log_p(everywhere),
        "layer by layer": log_p(torch.from_numpy(layerwise.values), alpha=1.5),
        "random": [log_p((rank < 4) & inside) for rank in ranks],
    }
    random = found.pop("random")
    assert found["with context"] > found["without context"] + 3
    assert found["reinforced"] > found["with context"] > np.mean(random)
    assert found["layer by layer"] > found["with context"]
    assert found["the other half"] < found["with context"]
    assert found["weakened"] < found["with context"]
    assert found["in all layers"] < found["with context"] - 3
