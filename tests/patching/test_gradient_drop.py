"""GradDrop's backward passes against runs whose layer outputs are detached by hand."""

import pytest
import torch

import interp
from interp.model import Site
from interp.model.hooks import Tap, tapped
from interp.patching.gradient_drop import INSIDE_A_LAYER, DroppedLayers
from tests.model.families import FAMILIES
from tests.patching.linear_model import pairs_of_tokens

TOKENS = pairs_of_tokens().clean


def metric(logits):
    return 2 * logits[:, 3] - logits[:, 5] ** 2


def detached(model, layer, sites):
    """Gradients of a run in which what a layer adds to the stream is cut off."""

    def cut(activation, run):
        return activation.detach()

    with tapped(model.anatomy, [Tap(Site(kind, layer), cut) for kind in ("attn_out", "mlp_out")]):
        return model.run_with_gradients(TOKENS, lambda logits: metric(logits[:, -1]), sites, logits_to_keep=1)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gpt_neox", "falcon", "gemma3_text", "olmo2", "granite", "mixtral", "opt-post_norm"]
)
def test_each_backward_pass_equals_that_of_a_run_with_detached_outputs(name, frozen):
    model = interp.load(FAMILIES[name].make_model("eager", torch.float64).requires_grad_(not frozen))
    sites = [site for site in model.site_names("*") if site.kind != "result"]
    dropped = DroppedLayers(model, TOKENS, metric, sites)
    plain = metric(model(TOKENS)[:, -1])
    # To float32: some norms round to it, and tapped scores go another way than the model's own.
    torch.testing.assert_close(dropped.values, plain, rtol=0, atol=1e-6)
    seen = 0
    for layer, gradients in enumerate(dropped.gradients()):
        _, activations, expected = detached(model, layer, [Site("embed"), *sites])
        for site in sites:
            torch.testing.assert_close(dropped.activations[site], activations[site], rtol=0, atol=1e-12)
            if site.layer == layer and site.kind in INSIDE_A_LAYER:
                assert not gradients[site].any()
                # Only at the cut itself does a run with detached outputs still see what comes after.
                assert site.kind in ("attn_out", "mlp_out") or not expected[site].any()
            else:
                torch.testing.assert_close(gradients[site], expected[site], rtol=1e-9, atol=1e-10, msg=site)
        seen += 1
    assert seen == model.n_layers


def test_late_sites_of_a_frozen_model_can_be_asked_for_alone():
    model = interp.load(FAMILIES["llama"].make_model("eager", torch.float64).requires_grad_(False))
    sites = model.site_names("blocks.1.attn.hook_z")
    dropped = DroppedLayers(model, TOKENS, metric, sites)
    for layer, gradients in enumerate(dropped.gradients()):
        _, _, expected = detached(model, layer, [Site("embed"), *sites])
        torch.testing.assert_close(gradients[sites[0]], expected[sites[0]], rtol=1e-9, atol=1e-10)


def test_every_dropped_layer_changes_something_and_nothing_is_left_behind():
    model = interp.load(FAMILIES["llama"].make_model("eager", torch.float64))
    before = model(TOKENS)
    embed = model.site_names("embed")
    _, _, plain = model.run_with_gradients(TOKENS, lambda logits: metric(logits[:, -1]), embed)
    dropped = DroppedLayers(model, TOKENS, metric, embed)
    found = [gradients[embed[0]] for gradients in dropped.gradients()]
    assert all(float((one - plain[embed[0]]).abs().max()) > 1e-3 for one in found)
    assert torch.equal(model(TOKENS), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules())
