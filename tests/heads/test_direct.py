import numpy as np
import pytest
import torch

import interp
from interp import heads

from .conftest import logit_diff
from .models import MODELS, make


def task_for(model: interp.Model) -> interp.tasks.Task:
    return interp.tasks.ioi(model, n=3, seed=1, corruption="abc")


def check_sum(model: interp.Model, task: interp.tasks.Task, cap: float | None = None) -> None:
    """Terms add up to the logit difference of a plain forward pass, undone of the soft-cap."""
    found = heads.direct_logit_attribution(model, task, by="component", per_prompt=True)
    for row, ids in enumerate(task.clean_ids):
        with torch.no_grad():
            logits = model.hf(torch.tensor([ids])).logits.double()
        if cap is not None:
            logits = cap * torch.atanh(logits / cap)
        expected = logit_diff(logits, task, row)
        assert abs(expected) > 1e-2
        assert float(found["effect"][row].sum()) == pytest.approx(expected, abs=1e-4)
    assert found.attrs["sum_error"] < 1e-4
    assert found.attrs["before_soft_cap"] == (cap is not None)


@pytest.mark.parametrize("name", MODELS)
def test_terms_add_up_to_the_logit_difference(name, tiny_tokenizer) -> None:
    model = make(name, tiny_tokenizer)
    check_sum(model, task_for(model), cap=5.0 if name == "gemma2" else None)


def test_terms_add_up_on_prompts_of_several_lengths(tiny, mixed_task) -> None:
    check_sum(tiny, mixed_task)


def test_a_head_writes_its_result_through_the_frozen_norm(tiny_llama, task_llama) -> None:
    """By the formula for RMSNorm: result · (weight · (W_U[answer] − W_U[wrong])) / rms."""
    _, cache = tiny_llama.run_with_cache(task_llama.clean)
    found = heads.direct_logit_attribution(tiny_llama, task_llama, per_prompt=True)["effect"]
    norm = tiny_llama.hf.model.norm
    for row in range(len(task_llama)):
        last = cache["resid_post", 2][row, -1]
        scale = (last.square().mean() + norm.variance_epsilon).sqrt()
        head_weight = tiny_llama.hf.lm_head.weight
        difference = head_weight[task_llama.answers[row, 0]] - head_weight[task_llama.wrong[row, 0]]
        for layer in range(3):
            expected = cache["result", layer][row, -1] @ (norm.weight * difference) / scale
            np.testing.assert_allclose(found[row, layer], expected.detach(), atol=1e-5)


def test_a_head_writes_through_the_norm_after_attention(tiny_tokenizer) -> None:
    """By Gemma 2's own formula: both norms frozen at the scale of the run."""
    model = make("gemma2", tiny_tokenizer)
    task = task_for(model)
    _, cache = model.run_with_cache(task.clean)
    found = heads.direct_logit_attribution(model, task, per_prompt=True)["effect"]
    layer, row = 1, 2
    block = model.hf.model.layers[layer]
    raw = cache["result", layer][row, -1]
    post, final = block.post_attention_layernorm, model.hf.model.norm
    share = raw * (1 + post.weight) / (raw.sum(0).square().mean() + post.eps).sqrt()
    torch.testing.assert_close(share.sum(0), cache["attn_out", layer][row, -1], atol=1e-4, rtol=1e-4)
    last = cache["resid_post", 1][row, -1]
    weight = model.hf.lm_head.weight
    difference = weight[task.answers[row, 0]] - weight[task.wrong[row, 0]]
    expected = share @ ((1 + final.weight) * difference) / (last.square().mean() + final.eps).sqrt()
    np.testing.assert_allclose(found[row, layer], expected.detach(), atol=1e-4)


def test_layers_and_heads_are_sums_of_components(tiny, task) -> None:
    by_component = heads.direct_logit_attribution(tiny, task, by="component")["effect"]
    by_head = heads.direct_logit_attribution(tiny, task, by="head")["effect"]
    by_layer = heads.direct_logit_attribution(tiny, task, by="layer")["effect"]
    for layer in range(tiny.n_layers):
        own = [f"L{layer}H{head}" for head in range(tiny.n_heads)]
        np.testing.assert_allclose(by_component.sel(component=own), by_head.sel(layer=layer), atol=1e-6)
        attention = by_component.sel(component=[*own, f"L{layer} attn bias"]).sum()
        assert float(by_layer.sel(layer=layer, part="attention")) == pytest.approx(float(attention), abs=1e-5)
        mlp = by_component.sel(component=f"L{layer} mlp")
        assert float(by_layer.sel(layer=layer, part="mlp")) == pytest.approx(float(mlp), abs=1e-6)


def test_several_answers_count_by_their_mean(tiny) -> None:
    pair = {
        "clean": "Mary and John went",
        "corrupted": "Tom and John went",
        "answer": [" to", " in", " on"],
        "wrong": [" at", " is"],
    }
    task = interp.tasks.from_pairs(tiny, [pair])
    logits = tiny(task.clean)[0, -1]
    expected = logits[task.answers[0]].mean() - logits[task.wrong[0]].mean()
    found = heads.direct_logit_attribution(tiny, task, by="component")
    assert float(found["effect"].sum()) == pytest.approx(float(expected), abs=1e-4)


def test_post_norm_models_and_missing_wrong_answers_are_refused(tiny_tokenizer, tiny_llama) -> None:
    model = make("opt", tiny_tokenizer, do_layer_norm_before=False)
    with pytest.raises(interp.UnsupportedModel, match="post-norm"):
        heads.direct_logit_attribution(model, task_for(model))
    pair = {"clean": "Mary and John went", "corrupted": "Tom and John went", "answer": " to"}
    with pytest.raises(ValueError, match="no wrong answer"):
        heads.direct_logit_attribution(tiny_llama, interp.tasks.from_pairs(tiny_llama, [pair], metric="log_prob"))


@pytest.fixture
def task_llama(tiny_llama) -> interp.tasks.Task:
    return task_for(tiny_llama)
