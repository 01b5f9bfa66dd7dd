"""Edits: every kind of change at every kind of place, against indexing done by hand in a hook."""

import pytest
import torch

from interp import Edit


@pytest.fixture
def model(tiny_llama):
    return tiny_llama


@pytest.fixture
def tokens(model):
    return torch.randint(0, model.d_vocab, (3, 7), generator=torch.Generator().manual_seed(1))


def by_hand(model, tokens, site, change):
    """Logits when `change` is applied in place by a hook."""

    def hook(activation, hook):
        change(activation)

    return model.run_with_hooks(tokens, [(site, hook)])


def assign(activation, index, value):
    activation[index] = value


CASES = {
    "value at heads": (
        Edit("blocks.1.attn.hook_z", heads=[1, 3], value=0.0),
        lambda act: assign(act, (slice(None), slice(None), [1, 3]), 0.0),
    ),
    "value at one position": (
        Edit("blocks.1.hook_resid_pre", positions=2, value=1.5),
        lambda act: assign(act, (slice(None), 2), 1.5),
    ),
    "negative position": (
        Edit("blocks.1.hook_resid_mid", positions=[-1], value=1.5),
        lambda act: assign(act, (slice(None), -1), 1.5),
    ),
    "slice of positions": (
        Edit("blocks.0.hook_attn_out", positions=slice(1, 4), scale=2.0),
        lambda act: act[:, 1:4].mul_(2.0),
    ),
    "neurons": (
        Edit("blocks.2.mlp.hook_post", neurons=[0, 5], add=3.0),
        lambda act: assign(act, (..., [0, 5]), act[..., [0, 5]] + 3.0),
    ),
    "rows": (
        Edit("blocks.0.hook_mlp_out", rows=[1], value=0.0),
        lambda act: assign(act, 1, 0.0),
    ),
    "query and key": (
        Edit("blocks.1.attn.hook_pattern", heads=[2], positions=[4, 6], keys=[0], value=0.25),
        lambda act: assign(act, (slice(None), 2, [4, 6], 0), 0.25),
    ),
    "key/value head": (
        Edit("blocks.1.attn.hook_k", heads=[1], scale=0.0),
        lambda act: act[:, :, 1].zero_(),
    ),
    "rotated key": (
        Edit("blocks.1.attn.hook_rot_k", positions=[0], scale=-1.0),
        lambda act: act[:, 0].neg_(),
    ),
    "function": (
        Edit("blocks.0.attn.hook_z", fn=torch.relu, heads=[0]),
        lambda act: act[:, :, 0].relu_(),
    ),
    "mean": (
        Edit("blocks.1.attn.hook_z", heads=[2], value="mean"),
        lambda act: assign(act, (slice(None), slice(None), 2), act.mean((0, 1))[2]),
    ),
    "result of a head": (
        Edit("blocks.1.attn.hook_result", heads=[2], positions=[3], value=0.0),
        lambda act: act[:, 3, 2].zero_(),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_edit_equals_indexing_by_hand(model, tokens, name):
    edit, change = CASES[name]
    with model.edited(edit):
        edited = model(tokens)
    torch.testing.assert_close(edited, by_hand(model, tokens, edit.site, change), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(edited, model(tokens), atol=1e-4), "the edit must reach the logits"


def test_a_result_of_zero_is_a_z_of_zero(model, tokens):
    with model.edited(Edit("result", heads=[2], value=0.0)):
        from_result = model(tokens)
    with model.edited(Edit("z", heads=[2], value=0.0)):
        torch.testing.assert_close(from_result, model(tokens), atol=1e-5, rtol=1e-5)


def test_a_whole_cached_tensor_is_taken_where_chosen(model, tokens):
    other = tokens.flip(0)
    _, cache = model.run_with_cache(other, "resid_pre")
    with model.edited(Edit("blocks.1.hook_resid_pre", value=cache["resid_pre", 1])):
        torch.testing.assert_close(model(tokens), model(other), atol=1e-6, rtol=1e-6)
    _, base = model.run_with_cache(tokens, "resid_pre")
    with model.edited(Edit("blocks.1.hook_resid_pre", value=cache["resid_pre", 1], positions=[3])):
        _, mixed = model.run_with_cache(tokens, "resid_pre")
    assert torch.equal(mixed["resid_pre", 1][:, 3], cache["resid_pre", 1][:, 3])
    keep = [position for position in range(7) if position != 3]
    assert torch.equal(mixed["resid_pre", 1][:, keep], base["resid_pre", 1][:, keep])


def test_setting_the_middle_of_the_stream_reaches_both_branches(model, tokens):
    # resid_mid feeds the MLP and the residual connection: with it at zero, the block's output is the MLP of zero.
    block = model.anatomy.text.blocks[1]
    with model.edited(Edit("blocks.1.hook_resid_mid", value=0.0)):
        _, cache = model.run_with_cache(tokens, ["resid_mid", "resid_post"])
    with torch.no_grad():
        expected = block.mlp(block.ln2(torch.zeros_like(cache["resid_mid", 1])))
    torch.testing.assert_close(cache["resid_post", 1], expected)


def test_caches_are_not_changed_by_later_edits_in_place(model, tokens):
    def double(activation, hook):
        activation.mul_(2)

    _, plain = model.run_with_cache(tokens, "resid_mid")
    with model.hooks([("resid_mid", double)]):
        _, changed = model.run_with_cache(tokens, "resid_mid")
    torch.testing.assert_close(changed["resid_mid", 0], 2 * plain["resid_mid", 0])
    _, again = model.run_with_cache(tokens, "resid_mid")
    assert torch.equal(again["resid_mid", 0], plain["resid_mid", 0])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda: Edit("z"), "exactly one of value, add, scale and fn; got none"),
        (lambda: Edit("z", value=0.0, add=1.0), "got value, add"),
        (lambda: Edit("z", value="median"), "the only value given by name is 'mean'"),
        (lambda: Edit("blocks.0.attn.hook_z", heads=[4], value=0.0), r"head 4 is out of range; heads run 0\.\.3"),
        (lambda: Edit("blocks.0.attn.hook_k", heads=[2], value=0.0), r"head 2 is out of range; heads run 0\.\.1"),
        (lambda: Edit("resid_pre", heads=[0], value=0.0), "has no head axis"),
        (lambda: Edit("z", keys=[0], value=0.0), "has no key axis"),
        (lambda: Edit("zz", value=0.0), "did you mean"),
        (lambda: Edit("blocks.7.hook_resid_pre", value=0.0), r"layer 7 is out of range; layers run 0\.\.2"),
    ],
)
def test_mistakes_are_named_before_any_run(model, edit, message):
    with pytest.raises(ValueError, match=message), model.edited(edit()):
        pass


def test_mistakes_that_need_the_prompt(model, tokens):
    message = r"position 7 is outside the prompt \(length 7\); positions run 0\.\.6"
    with model.edited(Edit("z", positions=[7], value=0.0)), pytest.raises(ValueError, match=message):
        model(tokens)
    with model.edited(Edit("z", value=torch.zeros(5))), pytest.raises(ValueError, match="does not broadcast"):
        model(tokens)
    with model.edited(Edit("pattern", value="mean")), pytest.raises(ValueError, match="no such mean"):
        model(tokens)
