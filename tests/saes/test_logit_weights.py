"""Logit weights against dense products of the raw parameters, and against a finite change of the stream."""

import numpy as np
import pytest
import torch

import interp
from interp.model import UnsupportedModel
from interp.saes.architectures import make
from interp.saes.logit_weights import logit_weights
from tests.model.families import FAMILIES
from tests.saes.shaken import z_sae


def dense(model: interp.Model, rows: torch.Tensor) -> np.ndarray:
    """centre(row) * gain @ W_U from raw parameters."""
    final = model.tower.ln_final
    centred = rows - rows.mean(-1, keepdim=True) if model.anatomy.family == "gpt2" else rows
    gain = 1 + final.weight if model.anatomy.family.startswith("gemma") else final.weight
    return (centred * gain @ model.hf.get_output_embeddings().weight.T).detach().numpy()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_top_and_bottom_tokens_are_those_of_the_dense_product(name) -> None:
    model = interp.Model(FAMILIES[name].make_model("eager"))
    sae = z_sae(model)
    found = logit_weights(model, sae, [4, 9], n=5)
    logits = dense(model, sae.W_dec[[4, 9]] @ model.W_O[2].flatten(0, 1))
    for row, feature in enumerate((4, 9)):
        order = np.argsort(logits[row])
        one = found.sel(feature=feature)
        assert one["token_id"].sel(side="top").values.tolist() == order[::-1][:5].tolist()
        assert one["token_id"].sel(side="bottom").values.tolist() == order[:5].tolist()
        assert one["weight"].sel(side="top").values == pytest.approx(logits[row][order[::-1][:5]], abs=1e-4)


def test_a_norm_after_attention_counts_with_its_gain() -> None:
    model = interp.Model(FAMILIES["gemma2"].make_model("eager"))
    sae = z_sae(model)
    written = sae.W_dec[[4]] @ model.W_O[2].flatten(0, 1) * (1 + model.tower.blocks[2].attn_post.weight)
    found = logit_weights(model, sae, 4, n=3)["weight"].sel(side="top").values[0]
    assert found == pytest.approx(np.sort(dense(model, written)[0])[::-1][:3], abs=1e-4)


def test_factors_of_the_residual_stream_and_the_logits_count() -> None:
    model = interp.Model(FAMILIES["granite"].make_model("eager"))
    sae, config = z_sae(model), model.hf.config
    assert config.residual_multiplier != 1
    assert config.logits_scaling != 1
    written = sae.W_dec[[4]] @ model.W_O[2].flatten(0, 1) * config.residual_multiplier / config.logits_scaling
    found = logit_weights(model, sae, 4, n=3)["weight"].sel(side="top").values[0]
    assert found == pytest.approx(np.sort(dense(model, written)[0])[::-1][:3], rel=1e-4)


def test_a_feature_in_the_last_stream_moves_logits_as_its_weights_say(tiny_llama) -> None:
    """A finite difference along the decoder row, the norm's scale held: the model's own logits move by the weights."""
    sae = make("relu", 32, 8, site="blocks.2.hook_resid_post")
    found = logit_weights(tiny_llama, sae, 3, n=4)
    _, cache = tiny_llama.run_with_cache("Mary and John", "blocks.2.hook_resid_post")
    stream, row = cache["resid_post", 2][0, -1], sae.W_dec[3].detach()
    row = row - (row @ stream) / (stream @ stream) * stream  # to first order this leaves the scale as it is
    scale = stream.square().mean().sqrt()
    moved, back = (tiny_llama.unembed(tiny_llama.final_norm(stream + sign * 1e-2 * row)) for sign in (1, -1))
    slopes = ((moved - back) / 2e-2 * scale).numpy()
    ids = found["token_id"].values[0]
    own = dense(tiny_llama, row[None])[0][ids]
    np.testing.assert_allclose(slopes[ids], own, atol=2e-3)


def test_token_strings_stand_beside(tiny_gpt2) -> None:
    found = logit_weights(tiny_gpt2, z_sae(tiny_gpt2), 0, n=2)
    for side in ("top", "bottom"):
        ids = found["token_id"].sel(side=side).values[0].tolist()
        assert found["token"].sel(side=side).values[0].tolist() == tiny_gpt2.to_str_tokens(ids)


def test_bad_input_is_refused(tiny_gpt2) -> None:
    with pytest.raises(ValueError, match="feature 24 is out of range"):
        logit_weights(tiny_gpt2, z_sae(tiny_gpt2), 24)
    with pytest.raises(ValueError, match="n=0 tokens of each kind"):
        logit_weights(tiny_gpt2, z_sae(tiny_gpt2), 2, n=0)
    with pytest.raises(ValueError, match=r"this one writes blocks\.1\.ln1\.hook_normalized"):
        logit_weights(tiny_gpt2, make("relu", 32, 8, site="blocks.1.ln1.hook_normalized"), 2)
    bert = interp.Model(FAMILIES["opt-post_norm"].make_model("eager"))
    with pytest.raises(UnsupportedModel, match="post-norm"):
        logit_weights(bert, z_sae(bert), 2)
