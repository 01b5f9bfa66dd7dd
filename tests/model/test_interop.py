"""Live TransformerLens and nnsight models: weights shared, numbers equal, and they go on working."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import interp

FAMILIES = ("tiny_llama", "tiny_gpt2")


@pytest.fixture(params=FAMILIES)
def tiny(request: pytest.FixtureRequest) -> interp.Model:
    return request.getfixturevalue(request.param)


@pytest.fixture
def prompts(tiny: interp.Model) -> torch.Tensor:
    return torch.randint(1, tiny.d_vocab, (2, 9), generator=torch.Generator().manual_seed(1))


def addresses(hf: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in (*hf.named_parameters(), *hf.named_buffers())}


def boot_bridge(model: interp.Model):
    bridges = pytest.importorskip("transformer_lens.model_bridge", reason="TransformerLens is not installed")
    return bridges.TransformerBridge.boot_transformers(
        "tiny", hf_model=model.hf, tokenizer=model.tokenizer, device="cpu"
    )


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_bridge_shares_every_parameter_and_buffer(tiny, prompts):
    before, where = tiny(prompts), addresses(tiny.hf)
    model = interp.load(boot_bridge(tiny), name="from a bridge")

    assert addresses(model.hf) == where
    assert type(model.hf) is type(tiny.hf)
    assert model.name == "from a bridge"
    close(model(prompts), before)


def test_numbers_equal_the_bridges(tiny, prompts):
    bridge = boot_bridge(tiny)
    model = interp.load(bridge)
    with torch.no_grad():
        theirs, their_cache = bridge.run_with_cache(prompts)
    ours, cache = model.run_with_cache(prompts, ["resid_post", "z", "pattern"])

    close(ours, theirs)
    for layer in range(model.n_layers):
        for site in ("hook_resid_post", "attn.hook_z", "attn.hook_pattern"):
            close(cache[f"blocks.{layer}.{site}"], their_cache[f"blocks.{layer}.{site}"])


def test_bridge_goes_on_working(tiny, prompts):
    bridge = boot_bridge(tiny)
    modules, state = [name for name, _ in bridge.named_modules()], set(bridge.state_dict())
    with torch.no_grad():
        before = bridge(prompts)
    bridge.train()

    model = interp.load(bridge)
    model.run_with_cache(prompts, "z")

    assert all(module.training for module in bridge.modules())
    assert not any(module.training for module in model.hf.modules())
    bridge.eval()
    assert [name for name, _ in bridge.named_modules()] == modules
    assert set(bridge.state_dict()) == state
    with torch.no_grad():
        assert torch.equal(bridge(prompts), before)
        hooked = bridge.run_with_hooks(prompts, fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: z * 0)])
    close(model.run_with_hooks(prompts, [("blocks.0.attn.hook_z", lambda z, hook: z * 0)]), hooked)


def test_a_change_of_the_shared_weights_reaches_both(tiny_llama):
    prompts = torch.arange(1, 8)[None]
    bridge = boot_bridge(tiny_llama)
    model = interp.load(bridge)
    before = model(prompts)
    with torch.no_grad():
        model.hf.model.layers[1].mlp.down_proj.weight.mul_(2)
        after = bridge(prompts)
    assert not torch.allclose(before, after)
    close(model(prompts), after)


def test_model_from_a_bridge_can_be_saved_and_differentiated(tiny, prompts, tmp_path):
    model = interp.load(boot_bridge(tiny))
    model.hf(prompts).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.hf.parameters())

    model.hf.save_pretrained(tmp_path)
    close(interp.load(tmp_path)(prompts), model(prompts))


def test_edited_bridge_whose_weights_cannot_be_shared_is_refused(tiny_gpt2):
    bridge = boot_bridge(tiny_gpt2)
    with torch.no_grad():
        bridge.blocks[0].attn.k.original_component.weight = nn.Parameter(torch.randn(32, 32))
    with pytest.raises(ValueError, match=r"processed or edited after it was made \(its logits differ"):
        interp.load(bridge)


@pytest.mark.parametrize("wrapper", ["TransformersModel", "LanguageModel"])
def test_nnsight_model_is_taken_as_it_is(wrapper, tiny, prompts):
    nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed")
    options = {"task": "text-generation"} if wrapper == "TransformersModel" else {}
    before, where = tiny(prompts), addresses(tiny.hf)
    with pytest.warns(nnsight.NNsightDeprecationWarning) if wrapper == "LanguageModel" else nullcontext():
        theirs = getattr(nnsight, wrapper)(tiny.hf, tokenizer=tiny.tokenizer, **options)

    model = interp.load(theirs)

    assert model.hf is tiny.hf
    assert model.tokenizer is theirs.tokenizer
    assert addresses(model.hf) == where
    assert torch.equal(model(prompts), before)
    with torch.no_grad(), theirs.trace(prompts):
        logits = theirs.lm_head.output.save()
    assert torch.equal(logits, before)


def test_tokenizer_given_wins_over_the_bridges(tiny_llama):
    bridge = boot_bridge(tiny_llama)
    assert interp.load(bridge).tokenizer is bridge.tokenizer
    assert interp.load(bridge, tokenizer=tiny_llama.tokenizer).tokenizer is tiny_llama.tokenizer


def test_transformer_lens_object_without_a_transformers_model_is_refused():
    hooked = type("HookedTransformer", (SimpleNamespace,), {"__module__": "transformer_lens.HookedTransformer"})()
    with pytest.raises(ValueError, match=r"HookedTransformer holds converted weights.*boot a TransformerBridge"):
        interp.load(hooked)


def test_objects_of_neither_library_do_not_import_them(tiny_llama, monkeypatch):
    for library in ("transformer_lens", "nnsight"):
        for module in [name for name in sys.modules if name.partition(".")[0] == library]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, library, None)  # importing it would raise
    assert interp.load(tiny_llama.hf).hf is tiny_llama.hf
