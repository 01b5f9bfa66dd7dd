"""VAR on planted sinks, against loops over heads and queries in hooks."""

import copy

import pytest
import torch

from interp import Edit, Model
from interp.sinks.redistribution import image_centric, redistributed
from tests.model.families import FAMILIES
from tests.sinks.planted import N_LAYERS, SINK_DIM, SINK_TOKENS, generated, planted_llama, step_by_step

#                       sink, text, six image patches (one of them a sink), text
PROMPTS = torch.tensor([[1, 20, 30, 31, 9, 33, 34, 35, 40, 41, 42], [22, 1, 50, 9, 51, 52, 53, 54, 43, 44, 45]])
IMAGE = torch.zeros(2, 11, dtype=torch.bool)
IMAGE[0, 2:8] = IMAGE[1, 3:8] = True
LENGTH = PROMPTS.shape[1]
ALL_LAYERS = range(N_LAYERS)
TAU_REL = 0.8  # √32 is small: at the default, ordinary tokens would be sinks by chance
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def model():
    return planted_llama()


def loop(layers, image, fraction=0.6, rho=0.5, least=0.2, selected=None):
    """VAR of one unpadded prompt (image: [pos]) by hooks, row by row, whatever its length by now."""
    sinks = {}
    is_image = image.tolist()

    def see_resid(activation, hook):
        x = activation[0].double()
        phi = x[:, SINK_DIM].abs() / (x.square().mean(-1) + 1e-6).sqrt()
        found = phi >= TAU_REL * x.shape[1] ** 0.5
        sinks[hook.layer()] = [k for k in range(len(is_image)) if found[k]]

    def edit(pattern, hook):
        n_heads, length = pattern.shape[1:3]
        at = sinks[hook.layer()]
        patches = [k for k in range(len(is_image)) if is_image[k]]
        free = [k for k in patches if k not in at]
        for h in range(n_heads):
            for q in range(patches[0], length):
                if q in patches:
                    continue
                row = pattern[0, h, q].tolist()
                on_image, on_free = sum(row[k] for k in patches), sum(row[k] for k in free)
                if on_image < least or on_free / on_image < rho or on_free == 0:
                    continue
                if selected is not None:
                    selected.add((hook.layer(), h, q))
                freed = fraction * sum(row[k] for k in at)
                for k in range(length):
                    if k in at:
                        row[k] *= 1 - fraction
                    elif k in free:
                        row[k] += freed * row[k] / on_free
                pattern[0, h, q] = torch.tensor(row)

    return [
        pair
        for layer in layers
        for pair in ((f"blocks.{layer}.hook_resid_pre", see_resid), (f"blocks.{layer}.attn.hook_pattern", edit))
    ]


@pytest.mark.parametrize("fraction", [0.6, 1.0])
@pytest.mark.parametrize("row", [0, 1])
def test_it_is_the_loop_over_heads_and_queries(model, row, fraction):
    tokens, image = PROMPTS[[row]], IMAGE[[row]]
    selected = set()
    expected = model.run_with_hooks(tokens, loop([2, 3], image[0], fraction, selected=selected))
    with redistributed(model, image, [SINK_DIM], tau_rel=TAU_REL, recycle_fraction=fraction):
        torch.testing.assert_close(model(tokens), expected, **TOLERANCE)
    assert 0 < len(selected) < 2 * 4 * 3, "some rows are edited and some are not"
    assert not torch.allclose(model(tokens), expected, atol=1e-3)


@pytest.mark.parametrize("fraction", [0.6, 1.0])
def test_edited_rows_are_exactly_those_selected(model, fraction):
    _, plain = model.run_with_cache(PROMPTS, ["pattern", "resid_pre"])
    layer, selected = 2, set()
    for row in range(2):
        model.run_with_hooks(PROMPTS[[row]], loop([layer], IMAGE[row], selected=(one := set())))
        selected |= {(row, h, q) for _, h, q in one}
    with redistributed(model, IMAGE, [SINK_DIM], tau_rel=TAU_REL, layers=[layer], recycle_fraction=fraction):
        _, edited = model.run_with_cache(PROMPTS, ["pattern"])
    before, after = plain["pattern", layer], edited["pattern", layer]
    changed = {tuple(one) for one in (before != after).any(-1).nonzero().tolist()}
    assert changed == selected
    torch.testing.assert_close(after.sum(-1), torch.ones(2, 4, LENGTH), atol=1e-6, rtol=0)
    is_sink = torch.isin(PROMPTS, torch.tensor(SINK_TOKENS))
    for b, h, q in selected:
        ratio = after[b, h, q, is_sink[b]] / before[b, h, q, is_sink[b]].clamp(min=1e-30)
        assert float(ratio.max()) == pytest.approx(1 - fraction, abs=1e-6)
        text = ~is_sink[b] & ~IMAGE[b]
        assert torch.equal(after[b, h, q, text], before[b, h, q, text])


def test_what_changes_nothing_is_bit_equal(model):
    plain = model(PROMPTS)
    for options in ({"recycle_fraction": 0.0}, {"min_image_mass": 1.0}, {"tau_rel": 1e6}, {"tau_rel": 0.0}):
        with redistributed(model, IMAGE, [SINK_DIM], layers=ALL_LAYERS, **{"tau_rel": TAU_REL, **options}):
            assert torch.equal(model(PROMPTS), plain), options
    with redistributed(model, IMAGE, [SINK_DIM + 1], tau_rel=TAU_REL, layers=ALL_LAYERS):  # no spike there
        assert torch.equal(model(PROMPTS), plain)


def test_default_layers_leave_out_0_1_and_the_last(model):
    with redistributed(model, IMAGE, [SINK_DIM], tau_rel=TAU_REL):
        default = model(PROMPTS)
    with redistributed(model, IMAGE, [SINK_DIM], tau_rel=TAU_REL, layers=[3, 2, 2]):
        assert torch.equal(model(PROMPTS), default)
    with redistributed(model, IMAGE, [SINK_DIM], tau_rel=TAU_REL, layers=ALL_LAYERS):
        assert not torch.allclose(model(PROMPTS), default, atol=1e-3)


def test_a_batch_is_each_prompt_alone(model):
    with redistributed(model, IMAGE, [SINK_DIM], tau_rel=TAU_REL):
        together = model(PROMPTS)
    for row in range(2):
        with redistributed(model, IMAGE[[row]], [SINK_DIM], tau_rel=TAU_REL):
            torch.testing.assert_close(together[[row]], model(PROMPTS[[row]]), **TOLERANCE)


def test_consecutive_prompts_do_not_see_each_other(model):
    # The second prompt has its sinks and its image at other places; the context stays open.
    both = IMAGE[[0]] | IMAGE[[1]]
    with redistributed(model, both, [SINK_DIM], tau_rel=TAU_REL):
        first, second = model(PROMPTS[[0]]), model(PROMPTS[[1]])
        generated_second = generated(model, PROMPTS[[1]], 3)[1]
    for tokens, found in ((PROMPTS[[1]], second), (PROMPTS[[0]], first)):
        with redistributed(model, both, [SINK_DIM], tau_rel=TAU_REL):
            torch.testing.assert_close(found, model(tokens), **TOLERANCE)
    with redistributed(model, both, [SINK_DIM], tau_rel=TAU_REL):
        torch.testing.assert_close(generated_second, generated(model, PROMPTS[[1]], 3)[1], **TOLERANCE)


def test_left_padding_changes_nothing(model):
    short = PROMPTS[0, 1:]  # begins with ordinary text
    image = torch.stack([torch.cat([torch.zeros(1, dtype=torch.bool), IMAGE[0, 1:]]), IMAGE[1]])
    with redistributed(model, image, [SINK_DIM], tau_rel=TAU_REL):
        padded = model([short.tolist(), PROMPTS[1].tolist()])
        continued = generated(model, [short.tolist(), PROMPTS[1].tolist()], 4)[1]
    for row, tokens in enumerate((short[None], PROMPTS[[1]])):
        with redistributed(model, image[[row], -tokens.shape[1] :], [SINK_DIM], tau_rel=TAU_REL):
            torch.testing.assert_close(padded[[row], -tokens.shape[1] :], model(tokens), **TOLERANCE)
            torch.testing.assert_close(continued[[row]], generated(model, tokens, 4)[1], **TOLERANCE)
    wrong = image.clone()
    wrong[0, 0] = True
    with redistributed(model, wrong, [SINK_DIM], tau_rel=TAU_REL), pytest.raises(ValueError, match="marks padding"):
        model([short.tolist(), PROMPTS[1].tolist()])


@pytest.mark.parametrize("row", [0, 1])
def test_decoding_with_a_cache_is_decoding_without(model, row):
    tokens, image = PROMPTS[[row]], IMAGE[[row]]
    # The oracle finds the sinks of the prompt anew in every whole pass; later tokens cannot change them.
    with model.hooks(loop([2, 3], image[0])):
        expected = step_by_step(model, tokens, 6)
    with redistributed(model, image, [SINK_DIM], tau_rel=TAU_REL):
        cached = generated(model, tokens, 6)
        uncached = generated(model, tokens, 6, use_cache=False)
    for sequences, logits in (cached, uncached):
        assert torch.equal(sequences, expected[0])
        torch.testing.assert_close(logits, expected[1], **TOLERANCE)
    assert not torch.allclose(generated(model, tokens, 6)[1], expected[1], atol=1e-3)


def test_a_generated_sink_token_is_no_sink(model):
    # Sinks are found in the prompt: what is decoded after it does not give.
    longer = torch.cat([PROMPTS[[0]], torch.tensor([[9, 25, 26]])], dim=1)
    with redistributed(model, IMAGE[[0]], [SINK_DIM], tau_rel=TAU_REL):
        found = model(longer)
    with model.hooks(loop([2, 3], IMAGE[0])):
        torch.testing.assert_close(found, model(longer), **TOLERANCE)


def test_beams_share_their_prompt(model):
    with redistributed(model, IMAGE, [SINK_DIM], tau_rel=TAU_REL):
        together = generated(model, PROMPTS, 4, num_beams=2)[0]
    for row in range(2):
        with redistributed(model, IMAGE[[row]], [SINK_DIM], tau_rel=TAU_REL):
            assert torch.equal(together[[row]], generated(model, PROMPTS[[row]], 4, num_beams=2)[0])


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "gpt2", "llava"])
def test_every_family_decodes_with_a_cache_as_without(name, cache):
    # Windows shorter than the prompt (the cache then holds the last keys only), learned sinks, room to spare.
    family = FAMILIES[name]
    model = Model(family.make_model(family.implementations[-1]))
    inputs = family.make_inputs()
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    n_prompts, length = inputs["input_ids"].shape
    image = torch.zeros(n_prompts, length, dtype=torch.bool)
    image[:, 1:-1] = True
    plant = Edit("hook_embed", positions=[0, length - 2], neurons=[SINK_DIM], add=100.0)
    options = {"layers": range(3), "min_image_mass": 0.0, "rho": 0.0}
    with model.edited(plant), redistributed(model, image, [SINK_DIM], tau_rel=TAU_REL, **options):
        cached = generated(model, inputs, 5, cache_implementation=cache)
        uncached = generated(model, inputs, 5, use_cache=False)
    torch.testing.assert_close(cached[1], uncached[1], atol=1e-4, rtol=1e-4)
    with model.edited(plant):
        assert not torch.allclose(generated(model, inputs, 5)[1], cached[1], atol=1e-3)


def test_image_centric_heads_are_chosen_by_the_non_sink_share():
    # Mass on the image .5, of which .3 on non-sinks: a share of .6; and a row that never looks at the image.
    pattern = torch.tensor([[0.4, 0.2, 0.3, 0.1], [0.9, 0.0, 0.0, 0.1]])[None, None]
    image, sinks = torch.tensor([[False, True, True, False]]), torch.tensor([[True, True, False, False]])
    for rho, least, expected in ((0.59, 0.49, True), (0.61, 0.49, False), (0.59, 0.51, False)):
        found = image_centric(pattern, image, sinks, rho=rho, min_image_mass=least)
        assert found.tolist() == [[[expected, False]]]
    assert image_centric(pattern, image, sinks, rho=0.0, min_image_mass=0.0).tolist() == [[[True, False]]]


def test_a_cache_from_outside_is_refused(model):
    with torch.no_grad():
        cache = model.hf(PROMPTS, use_cache=True).past_key_values
    with (
        redistributed(model, IMAGE, [SINK_DIM], tau_rel=TAU_REL),
        pytest.raises(ValueError, match="run the prompt inside the context"),
    ):
        model.hf(torch.tensor([[5], [6]]), past_key_values=cache)


def test_mistakes_are_named(model):
    def refused(message, image=IMAGE, dims=(SINK_DIM,), **options):
        with pytest.raises(ValueError, match=message), redistributed(model, image, dims, **options):
            pass

    refused(r"recycle_fraction is 1\.2; it is a share", recycle_fraction=1.2)
    refused("image_positions marks no token", image=torch.zeros(2, 11, dtype=torch.bool))
    refused("sink_dims is empty", dims=())
    refused(r"dimension 32 is out of range; dimensions run 0\.\.31", dims=[32])
    refused(r"layer 5 is out of range; layers run 0\.\.4", layers=[5])
    refused("layers is empty", layers=[])
    with redistributed(model, IMAGE, [SINK_DIM], tau_rel=TAU_REL):
        with pytest.raises(ValueError, match="image_positions has 2 prompts, and this run 1"):
            model(PROMPTS[[0]])
        with pytest.raises(ValueError, match="image_positions has 11 columns, and the prompt 9 tokens"):
            model(PROMPTS[:, :9])


def test_small_models_need_layers_by_name(tiny_llama):
    message = "none in a model of 3 layers"
    with pytest.raises(ValueError, match=message), redistributed(tiny_llama, IMAGE, [SINK_DIM], tau_rel=TAU_REL):
        pass


def test_the_model_is_left_as_found(model):
    before = copy.deepcopy(model.hf.state_dict())
    plain = model(PROMPTS)

    def interrupted():
        with redistributed(model, IMAGE, [SINK_DIM], tau_rel=TAU_REL):
            model(PROMPTS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(model(PROMPTS), plain)
    assert all(torch.equal(one, before[name]) for name, one in model.hf.state_dict().items())
    assert model.hf.config._attn_implementation == "sdpa"
