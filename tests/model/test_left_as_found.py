"""Whatever happens inside a call, the wrapped model comes back exactly as it was."""

import threading

import pytest
import torch

from interp import Edit
from interp.model.attention import IMPLEMENTATION

EVERY_SITE = "*"


def state(model):
    """Everything about the wrapped module that a call could leave changed."""
    return {
        "hooks": [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in model.hf.named_modules()
        ],
        "attributes": [(name, sorted(vars(module))) for name, module in model.hf.named_modules()],
        "forward": [name for name, module in model.hf.named_modules() if "forward" in vars(module)],
        "attention": model.hf.config._attn_implementation,
        "training": [module.training for module in model.hf.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.hf.parameters()],
        "grad": [parameter.grad is None for parameter in model.hf.parameters()],
        "versions": [parameter._version for parameter in model.hf.parameters()],
    }


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def tokens(model):
    return torch.randint(0, model.d_vocab, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("site", ["resid_mid", "q", "rot_k", "pattern", "result", "mlp_post", "ln_final"])
def test_an_exception_in_a_hook_leaves_no_trace(model, tokens, error, site):
    before, logits = state(model), model(tokens)

    def fail(activation, hook):
        raise error("stop")

    with pytest.raises(error, match="stop"):
        model.run_with_hooks(tokens, [(EVERY_SITE, lambda activation, hook: None), (site, fail)])
    assert state(model) == before
    assert torch.equal(model(tokens), logits)


def test_an_unknown_site_is_refused_before_anything_is_installed(model, tokens):
    before = state(model)
    with pytest.raises(ValueError, match="hook_z"):
        model.run_with_hooks(tokens, [("z", lambda *_: None), ("blocks.0.attn.hook_zz", lambda *_: None)])
    with pytest.raises(ValueError, match=r"layer 99 is out of range; layers run 0\.\.\d"):
        model.run_with_cache(tokens, "blocks.99.attn.hook_z")
    assert state(model) == before


def test_contexts_nest_and_end_in_any_order(model, tokens):
    before, plain = state(model), model(tokens)
    outer = model.edited(Edit("pattern", scale=0.5))
    inner = model.edited(Edit("z", scale=2.0))
    outer.__enter__()
    inner.__enter__()
    both = model(tokens)
    outer.__exit__(None, None, None)
    assert model.hf.config._attn_implementation == before["attention"]
    only_inner = model(tokens)
    inner.__exit__(None, None, None)
    # Halving the pattern halves z, so that the two edits cancel.
    torch.testing.assert_close(both, plain, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(only_inner, plain, atol=1e-3)
    assert state(model) == before


def test_inner_edits_see_what_outer_edits_did(model, tokens):
    with model.edited(Edit("z", value=1.0)), model.edited(Edit("z", add=1.0)):
        _, cache = model.run_with_cache(tokens, "z")
    assert torch.equal(cache["z", 0], torch.full_like(cache["z", 0], 2.0))


def test_another_thread_is_not_affected(model, tokens):
    plain = model(tokens)
    inside, release = threading.Event(), threading.Event()
    seen = {}

    def edit_in_thread():
        with model.edited([Edit("pattern", value=0.0), Edit("resid_mid", scale=3.0)]):
            inside.set()
            release.wait(10)
            seen["edited"] = model(tokens)

    thread = threading.Thread(target=edit_in_thread)
    thread.start()
    assert inside.wait(10)
    assert model.hf.config._attn_implementation == IMPLEMENTATION, "the test needs the edit to be in force"
    assert torch.equal(model(tokens), plain)
    with torch.no_grad():
        assert torch.equal(model.hf(tokens).logits, plain)
    release.set()
    thread.join()
    assert not torch.allclose(seen["edited"], plain, atol=1e-3)
    assert torch.equal(model(tokens), plain)


def test_many_threads_at_once(model, tokens):
    before = state(model)
    expected = {}
    for head in range(4):
        with model.edited(Edit("pattern", value=0.0, heads=[head])):
            expected[head] = model(tokens)
    found = {}

    def work(head):
        for _ in range(5):
            with model.edited(Edit("pattern", value=0.0, heads=[head])):
                found.setdefault(head, []).append(model(tokens))

    threads = [threading.Thread(target=work, args=(head,)) for head in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for head in range(4):
        assert all(torch.equal(one, expected[head]) for one in found[head])
    assert state(model) == before


def test_the_users_own_hooks_stay_and_act(model, tokens):
    module = model.anatomy.text.blocks[0].o
    calls = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ZeroDivisionError):
            model.run_with_hooks(tokens, [("z", lambda *_: 1 / 0)])
        model.run_with_cache(tokens, "z")
        assert len(module._forward_hooks) == 1
        assert calls == [1]
    finally:
        handle.remove()


def test_training_and_frozen_flags_survive(model, tokens):
    parameters = list(model.hf.parameters())
    parameters[0].requires_grad_(False)
    try:
        before = state(model)
        model.run_with_gradients(tokens, lambda logits: logits[:, -1, 0], "*")
        model.run_with_cache(tokens)
        assert state(model) == before
    finally:
        parameters[0].requires_grad_(True)


def test_the_model_can_still_be_saved(model, tokens, tmp_path):
    model.run_with_cache(tokens)
    model.hf.save_pretrained(tmp_path)
    reloaded = type(model.hf).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(reloaded.eval()(tokens).logits, model(tokens))
