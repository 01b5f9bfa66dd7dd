"""The whole patching path against another library: TransformerLens's `get_act_patch_*` on the same random weights."""

import copy

import pytest
import torch

from interp.patching import activation_patching
from interp.tasks import from_pairs

patching = pytest.importorskip("transformer_lens.patching", reason="needs TransformerLens (extra interop)")

CLEAN = "When Mary and John went to the store, John gave a book to"
CORRUPTED = "When Mary and John went to the store, Mary gave a book to"

# Our site and the function of theirs for the same map. Not resid_mid: on a bridge, that hook is the second norm's input
# alone, so that a patch there misses the residual connection (ours is checked by hand in tests/model/test_edit.py).
BY_POSITION = {
    "resid_pre": patching.get_act_patch_resid_pre,
    "attn_out": patching.get_act_patch_attn_out,
    "mlp_out": patching.get_act_patch_mlp_out,
}
BY_HEAD = {
    "z": patching.get_act_patch_attn_head_out_all_pos,
    "q": patching.get_act_patch_attn_head_q_all_pos,
    "k": patching.get_act_patch_attn_head_k_all_pos,
    "v": patching.get_act_patch_attn_head_v_all_pos,
    "pattern": patching.get_act_patch_attn_head_pattern_all_pos,
}
BY_HEAD_AND_POSITION = {
    "z": patching.get_act_patch_attn_head_out_by_pos,
    "v": patching.get_act_patch_attn_head_v_by_pos,
}


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def setting(request):
    """Our model and task, and the bridge, its clean cache and metric (normalised: 0 corrupted, 1 clean)."""
    from transformer_lens.model_bridge import TransformerBridge

    model = request.getfixturevalue(request.param)
    task = from_pairs(model, [{"clean": CLEAN, "corrupted": CORRUPTED, "answer": " Mary", "wrong": " John"}])
    bridge = TransformerBridge.boot_transformers(
        "tiny", hf_model=copy.deepcopy(model.hf), tokenizer=model.tokenizer, device="cpu"
    )
    _, cache = bridge.run_with_cache(task.clean)

    def logit_diff(logits):
        return logits[0, -1, task.answers[0, 0]] - logits[0, -1, task.wrong[0, 0]]

    clean, corrupted = (logit_diff(bridge(tokens)) for tokens in (task.clean, task.corrupted))
    return model, task, bridge, cache, lambda logits: (logit_diff(logits) - corrupted) / (clean - corrupted)


@pytest.mark.parametrize("site", BY_POSITION)
def test_layer_by_position(setting, site):
    model, task, bridge, cache, metric = setting
    ours = activation_patching(model, task, site=site, by=("layer", "position"))
    theirs = BY_POSITION[site](bridge, task.corrupted, cache, metric)
    assert ours.dims == ("layer", "position")
    torch.testing.assert_close(torch.tensor(ours.values), theirs.float(), atol=1e-4, rtol=1e-4)
    assert abs(ours).max() > 0.05, "a map of zeros would agree with anything"


@pytest.mark.parametrize("site", BY_HEAD)
def test_layer_by_head(setting, site):
    model, task, bridge, cache, metric = setting
    ours = activation_patching(model, task, site=site, by=("layer", "head"))
    theirs = BY_HEAD[site](bridge, task.corrupted, cache, metric)
    assert ours.sizes["head"] == model.n_heads_at(site)
    torch.testing.assert_close(torch.tensor(ours.values), theirs.float(), atol=1e-4, rtol=1e-4)
    assert abs(ours).max() > 0.01


@pytest.mark.parametrize("site", BY_HEAD_AND_POSITION)
def test_layer_by_position_by_head(setting, site):
    model, task, bridge, cache, metric = setting
    ours = activation_patching(model, task, site=site, by=("layer", "head", "position"))
    theirs = BY_HEAD_AND_POSITION[site](bridge, task.corrupted, cache, metric)
    assert ours.dims == ("layer", "position", "head")
    torch.testing.assert_close(torch.tensor(ours.values), theirs.float(), atol=1e-4, rtol=1e-4)


def test_pattern_by_destination(setting):
    model, task, bridge, cache, metric = setting
    ours = activation_patching(model, task, site="pattern", by=("layer", "head", "query"))
    theirs = patching.get_act_patch_attn_head_pattern_by_pos(bridge, task.corrupted, cache, metric)
    torch.testing.assert_close(torch.tensor(ours.values), theirs.float(), atol=1e-4, rtol=1e-4)
