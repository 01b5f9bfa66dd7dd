"""Calls on a model: caches, hooks, padding, generation, gradients."""

import copy

import pytest
import torch

from interp import Edit, Model, Site
from interp.model.sites import SITE_DIMS


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def tokens(model):
    return torch.randint(0, model.d_vocab, (2, 7), generator=torch.Generator().manual_seed(2))


def test_a_cache_holds_what_was_asked_and_no_more_memory(model, tokens):
    _, cache = model.run_with_cache(tokens, ["z", "blocks.1.attn.hook_v"], positions=[0, -1])
    names = ("0.attn.hook_z", "1.attn.hook_v", "1.attn.hook_z", "2.attn.hook_z")
    assert list(cache) == [f"blocks.{name}" for name in names]
    assert cache["z", 0].shape == (2, 2, model.n_heads, model.d_head)
    assert cache.nbytes == sum(tensor.nbytes for tensor in cache.values())
    _, whole = model.run_with_cache(tokens, "z")
    assert torch.equal(cache["z", 2], whole["z", 2][:, [0, 6]])
    _, fused = model.run_with_cache(tokens, "k")
    assert fused.nbytes == sum(tensor.nbytes for tensor in fused.values()), "k must not keep q and v alive"


def test_a_cache_is_read_by_name_short_form_and_site(model, tokens):
    _, cache = model.run_with_cache(tokens, ["z", "ln_final"])
    assert cache["blocks.2.attn.hook_z"] is cache["z", 2] is cache[Site("z", layer=2)]
    assert cache["ln_final"] is cache["ln_final.hook_normalized"]
    assert cache.stack("z").shape == (3, 2, 7, model.n_heads, model.d_head)
    with pytest.raises(KeyError, match="was not cached; this cache holds ln_final, z"):
        cache["v", 0]
    assert cache.to(dtype=torch.float64)["z", 0].dtype == torch.float64


def test_dtype_and_device_apply_as_activations_are_taken(model, tokens):
    _, cache = model.run_with_cache(tokens, "pattern", dtype=torch.bfloat16, device="cpu")
    assert cache["pattern", 0].dtype == torch.bfloat16


def test_a_filter_that_matches_nothing_is_an_error(model, tokens):
    with pytest.raises(ValueError, match="accepted none"):
        model.run_with_cache(tokens, lambda name: name.endswith("hook_zz"))


def test_hooks_mean_what_they_mean_in_transformer_lens(model, tokens):
    seen = []

    def look(activation, hook):
        seen.append((hook.name, hook.layer(), tuple(activation.shape)))

    def replace(activation, hook):
        return torch.zeros_like(activation)

    logits = model.run_with_hooks(tokens, [(lambda name: name.endswith("hook_z"), look), ("z", replace)])
    assert seen[1] == ("blocks.1.attn.hook_z", 1, (2, 7, model.n_heads, model.d_head))
    with model.edited(Edit("z", value=0.0)):
        assert torch.equal(logits, model(tokens))
    with pytest.raises(ValueError, match="returned shape"):
        model.run_with_hooks(tokens, [("z", lambda activation, hook: activation[:, :1])])


def test_prompts_of_different_length_equal_each_alone(model):
    texts = ["Mary gave a book", "When Mary and John went to the store , John gave", "John"]
    together, cache = model.run_with_cache(texts, ["resid_post", "pattern", "z"], positions=[-1])
    for row, text in enumerate(texts):
        alone, cache_alone = model.run_with_cache(text, ["resid_post", "pattern", "z"], positions=[-1])
        torch.testing.assert_close(together[row, -1], alone[0, -1], atol=1e-5, rtol=1e-5)
        for kind in ("resid_post", "z"):
            torch.testing.assert_close(cache[kind, 2][row], cache_alone[kind, 2][0], atol=1e-5, rtol=1e-5)
        n_padding = int(cache.n_padding[row])
        pattern = cache["pattern", 2][row]
        torch.testing.assert_close(pattern[..., n_padding:], cache_alone["pattern", 2][0], atol=1e-5, rtol=1e-5)
        assert not pattern[..., :n_padding].any()


def test_positions_of_padded_prompts_count_from_their_own_start(model):
    texts = ["Mary gave a book", "When Mary and John went to the store"]
    edit = Edit("resid_pre", positions=[1], scale=3.0)
    with model.edited(edit):
        together = model(texts)
        for row, text in enumerate(texts):
            torch.testing.assert_close(together[row, -1], model(text)[0, -1], atol=1e-5, rtol=1e-5)
    _, cache = model.run_with_cache(texts, "resid_pre", positions=[1])
    for row, text in enumerate(texts):
        _, alone = model.run_with_cache(text, "resid_pre")
        torch.testing.assert_close(cache["resid_pre", 2][row, 0], alone["resid_pre", 2][0, 1], atol=1e-5, rtol=1e-5)


def test_texts_of_different_length_do_not_become_tokens(model):
    with pytest.raises(ValueError, match="give them to the model as text"):
        model.to_tokens(["Mary", "Mary gave"])


def test_logits_to_keep_keeps_the_last(model, tokens):
    torch.testing.assert_close(model(tokens, logits_to_keep=2), model(tokens)[:, -2:], atol=1e-6, rtol=1e-6)


EDITS = {
    "every position": [Edit("blocks.1.attn.hook_z", heads=[1], value=0.0)],
    "a prompt position": [Edit("blocks.1.hook_resid_pre", positions=[2], scale=-2.0)],
    "a generated position": [Edit("blocks.0.hook_attn_out", positions=[5], value=0.7)],
    "rotated keys": [Edit("blocks.1.attn.hook_rot_k", positions=[0, 5], scale=3.0)],
    "pattern keys": [Edit("blocks.2.attn.hook_pattern", keys=[1], value=0.0)],
    "middle of the stream": [Edit("resid_mid", positions=[1, 6], add=0.5)],
    "two edits": [Edit("blocks.1.mlp.hook_post", neurons=[3], value=4.0), Edit("blocks.0.attn.hook_v", scale=0.5)],
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_hold_while_generating_with_a_cache(model, name):
    prompt = torch.tensor([[5, 9, 11, 4]])
    with model.edited(EDITS[name]):
        cached = model.generate(prompt, max_new_tokens=6, eos_token_id=None)
    sequence = prompt
    for _ in range(6):
        # The slow twin: the whole sequence at once, edits of positions beyond it left out.
        with model.edited([within(edit, sequence.shape[1]) for edit in EDITS[name]]):
            sequence = torch.cat([sequence, model(sequence)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, sequence)


def within(edit, length):
    if edit.positions is None:
        return edit
    fields = {name: getattr(edit, name) for name in ("site", "value", "add", "scale", "heads", "neurons", "keys")}
    return Edit(**fields, positions=[position for position in edit.positions if position < length])


def test_a_cached_tensor_acts_on_the_prompt_only_while_generating(model):
    prompt = torch.tensor([[5, 9, 11, 4]])
    _, cache = model.run_with_cache(prompt.flip(1), "z")
    with model.edited(Edit("blocks.0.attn.hook_z", value=cache["z", 0])):
        out = model.generate(prompt, max_new_tokens=3, eos_token_id=None)
    assert out.shape == (1, 7)


def test_gradients_at_every_site_in_one_backward(model, tokens):
    values, activations, gradients = model.run_with_gradients(tokens, lambda logits: logits[:, -1, 3], "*")
    assert torch.allclose(values, model(tokens)[:, -1, 3], atol=1e-5)
    assert list(activations) == list(gradients) == model.site_names("*")
    for site, gradient in gradients.items():
        assert gradient.shape == activations[site].shape


SITES = "resid_pre resid_mid q rot_k attn_scores pattern z result attn_out mlp_pre mlp_post".split()  # noqa: SIM905


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_equal_finite_differences(model, tokens, site, frozen):
    model = Model(copy.deepcopy(model.hf).double().requires_grad_(not frozen))
    _, activations, gradients = model.run_with_gradients(tokens, answer_logit, [site])
    one = Site(site, layer=1)
    direction = torch.randn(activations[one].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if "key" in SITE_DIMS[site]:
        direction = direction.tril()
    # Llama's norm computes in float32 whatever the model's dtype, so the step must not be tiny.
    step = 1e-3
    found = []
    for sign in (1, -1):
        with model.edited(Edit(one, add=sign * step * direction)):
            found.append(answer_logit(model(tokens)))
    numerical = (found[0] - found[1]) / (2 * step)
    analytic = (gradients[one] * direction).flatten(1).sum(1)
    torch.testing.assert_close(analytic, numerical, atol=3e-4, rtol=1e-3)


def answer_logit(logits):
    return logits[:, -1, 3]


def test_not_finite_is_traced_to_its_site(model, tokens):
    poisoned = model.edited(Edit("blocks.1.hook_mlp_out", positions=[2], value=float("nan")))
    message = r"first at blocks\.1\.hook_mlp_out"
    with poisoned:
        with pytest.raises(FloatingPointError, match=message):
            model(tokens)
        with pytest.raises(FloatingPointError, match=message):
            model.run_with_cache(tokens, "z")
        with pytest.raises(FloatingPointError, match=message):
            model.run_with_gradients(tokens, answer_logit, "z")


def test_empty_prompts_are_refused(model):
    with pytest.raises(ValueError, match="empty prompt"):
        model(torch.empty(1, 0, dtype=torch.long))


def test_unembedding_the_final_stream_gives_the_logits(model, tokens):
    logits, cache = model.run_with_cache(tokens, "resid_post")
    torch.testing.assert_close(model.unembed(model.final_norm(cache["resid_post", 2])), logits, atol=1e-5, rtol=1e-5)
