import numpy as np
import pytest
import torch

from interp import heads
from interp.metrics import METRICS

from .conftest import logit_diff


def test_the_end_of_the_lens_is_the_models_own_metric(tiny, task) -> None:
    found = heads.logit_lens(tiny, task, per_prompt=True)
    for row in range(len(task)):
        expected = logit_diff(tiny(task.clean[[row]]), task, row)
        assert float(found[row, -1, -1]) == pytest.approx(expected, abs=1e-4)
    np.testing.assert_allclose(heads.logit_lens(tiny, task, batch_size=1), found.mean("prompt"), atol=1e-5)


def test_every_depth_is_the_hidden_state_of_transformers_through_norm_and_head(tiny, task) -> None:
    found = heads.logit_lens(tiny, task, metric="log_prob", per_prompt=True)
    with torch.no_grad():
        hidden = tiny.hf(task.clean, output_hidden_states=True).hidden_states
        for layer in range(tiny.n_layers):  # the last hidden state of transformers is normed already
            logits = tiny.hf.lm_head(tiny.tower.ln_final(hidden[layer]))
            for position in range(task.clean.shape[1]):
                expected = METRICS["log_prob"](logits[:, position], task.answers, task.wrong)
                np.testing.assert_allclose(found.sel(layer=layer, position=position), expected, atol=1e-4)


def test_half_steps_are_the_stream_after_attention(tiny, task) -> None:
    found = heads.logit_lens(tiny, task, per_prompt=True)
    assert list(found.layer.values) == [step / 2 for step in range(2 * tiny.n_layers + 1)]
    assert list(found.stage.values[:3]) == ["0_pre", "0_mid", "1_pre"]
    assert found.stage.values[-1] == "final_post"
    _, cache = tiny.run_with_cache(task.clean, "blocks.1.hook_resid_mid")
    logits = tiny.unembed(tiny.final_norm(cache["resid_mid", 1]))
    expected = METRICS["logit_diff"](logits[:, 4], task.answers, task.wrong)
    np.testing.assert_allclose(found.sel(layer=1.5, position=4), expected, atol=1e-4)
    assert list(found.token.values) == list(task.str_tokens[0])


def test_prompts_of_several_lengths_have_no_common_positions(tiny, mixed_task) -> None:
    with pytest.raises(ValueError, match="by_length"):
        heads.logit_lens(tiny, mixed_task)
