import numpy as np
import pandas as pd
import pytest
import torch
import transformers
import xarray as xr

import interp
from interp import heads
from interp.heads.roles import roles


def test_a_row_a_head_with_the_numbers_of_the_measures(tiny, task) -> None:
    frame = heads.table(tiny, task, seed=3)
    assert list(frame.index) == [f"L{layer}H{head}" for layer in range(tiny.n_layers) for head in range(tiny.n_heads)]
    shape = (tiny.n_layers, tiny.n_heads)
    expected = {
        "gate": heads.gradient_gates(tiny, task)["effect"],
        "gate_signed": heads.gradient_gates(tiny, task, signed=True)["effect"],
        "direct": heads.direct_logit_attribution(tiny, task)["effect"],
        "direct_high": heads.direct_logit_attribution(tiny, task)["high"],
        "induction": heads.pattern_scores(tiny, heads.planted_tokens(tiny, seed=3))["induction"],
        "entropy": heads.attention_statistics(tiny, task)["entropy"],
        "end_to_S2": heads.end_attention(tiny, task).sel(target="S2"),
        "copying_eigenvalues": heads.copying_eigenvalues(tiny),
        "negative_copying_top_k": heads.copying_top_k(tiny, task)["negative"],
    }
    for ablation in ("zero", "mean", "resample"):
        effect = heads.leave_one_out(tiny, task, ablation=ablation)
        expected |= {f"importance_{ablation}": effect["effect"], f"importance_{ablation}_low": effect["low"]}
        expected[f"kl_{ablation}"] = heads.kl_importance(tiny, task, ablation=ablation)["effect"]
    for name, values in expected.items():
        np.testing.assert_allclose(frame[name].to_numpy().reshape(shape), values, atol=1e-5, err_msg=name)
    assert frame.attrs["unavailable"] == {}
    assert frame.attrs["task"] == "ioi"
    assert {"zero ablation", "gates", "attention"} <= set(frame.attrs["seconds"])


def test_what_a_family_cannot_have_is_missing_with_its_reason(tiny_tokenizer) -> None:
    config = transformers.GPTJConfig(
        vocab_size=len(tiny_tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=128, rotary_dim=4
    )
    model = interp.load(transformers.GPTJForCausalLM(config).eval(), tokenizer=tiny_tokenizer)
    frame = heads.table(model, interp.tasks.ioi(model, n=2), ablations=["zero"])
    assert "induction" not in frame
    assert "AttentionInterface" in frame.attrs["unavailable"]["pattern scores"]
    assert frame["importance_zero"].notna().all()
    assert (frame["role"] == "").all()


def heads_with(**columns: float) -> pd.DataFrame:
    values = {
        "importance_mean": 0.0, "importance_mean_low": -0.1, "direct": 0.0, "direct_low": -0.1, "direct_high": 0.1,
        "previous_token": 0.0, "induction": 0.0, "duplicate_token": 0.0, "end_to_answer": 0.0, "end_to_wrong": 0.0,
    }  # fmt: skip
    return pd.DataFrame([values | columns], index=["L0H0"])


CAUSE = {"importance_mean": 0.5, "importance_mean_low": 0.2}
WRITES = {"direct": 0.5, "direct_low": 0.2, "direct_high": 0.8}
WRITES_AGAINST = {"direct": -0.5, "direct_low": -0.8, "direct_high": -0.2}


@pytest.mark.parametrize(
    ("columns", "role"),
    [
        ({"induction": 0.9}, ""),  # attention without cause
        ({"induction": 0.9, "importance_mean": 0.5}, ""),  # an interval that holds 0
        ({"induction": 0.9, "importance_mean": 0.01, "importance_mean_low": 0.005}, ""),  # too small
        (CAUSE, ""),  # cause without attention
        ({"induction": 0.9, **CAUSE}, "induction"),
        ({"previous_token": 0.9, **CAUSE}, "previous token"),
        ({"duplicate_token": 0.4, "induction": 0.5, **CAUSE}, "induction, duplicate token"),
        ({"end_to_answer": 0.6}, ""),
        ({"end_to_answer": 0.6, **CAUSE}, ""),  # matters, but writes nothing
        ({"end_to_answer": 0.6, **WRITES}, "mover"),
        ({"end_to_answer": 0.6, **WRITES_AGAINST}, "negative mover"),
        ({"end_to_answer": 0.2, **WRITES_AGAINST}, ""),
        ({"end_to_wrong": 0.6, **WRITES}, "copy suppression"),
        ({"end_to_answer": float("nan"), **WRITES}, ""),
    ],
)
def test_a_role_needs_attention_and_cause(columns: dict[str, float], role: str) -> None:
    found = roles(heads_with(**columns), importance="importance_mean", metric_clean=-4.0, logit_diff_clean=4.0)
    assert found["L0H0"] == role


def test_results_survive_netcdf(tiny, task, tmp_path) -> None:
    results = {
        "importance": heads.leave_one_out(tiny, task, ablation="zero", per_prompt=True),
        "direct": heads.direct_logit_attribution(tiny, task, by="component"),
        "patterns": heads.pattern_scores(tiny, heads.planted_tokens(tiny, period=10, n_sequences=2)),
        "statistics": heads.attention_statistics(tiny, task),
        "lens": heads.logit_lens(tiny, task),
        "from_end": heads.end_attention(tiny, task),
        "composition": heads.composition(tiny, "Q"),
        "copying": heads.copying_top_k(tiny, task),
        "pattern": heads.pattern(tiny, task.clean[0], 0, 0),
    }
    for name, result in results.items():
        path = tmp_path / f"{name}.nc"
        result.to_netcdf(path)
        with (xr.open_dataset if isinstance(result, xr.Dataset) else xr.open_dataarray)(path) as read:
            xr.testing.assert_equal(read.load(), result)
        assert result.attrs["model"] == tiny.name
        assert result.attrs["interp"] == interp.__version__


def test_the_model_comes_back_as_it_was(tiny, task) -> None:
    def state() -> list:
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in tiny.hf.modules()]
        flags = [parameter.requires_grad for parameter in tiny.hf.parameters()]
        gradients = [parameter.grad for parameter in tiny.hf.parameters()]
        return [hooks, flags, gradients, tiny.hf.config._attn_implementation]

    before, logits = state(), tiny(task.clean)
    heads.table(tiny, task, ablations=["mean"])
    heads.logit_lens(tiny, task)
    assert state() == before
    assert torch.equal(tiny(task.clean), logits)
