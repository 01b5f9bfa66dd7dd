import numpy as np
import pytest
import torch
from scipy import stats

from interp import Edit, heads
from interp.heads.ablation import ablate_heads
from interp.metrics import METRICS, bootstrap_interval
from interp.patching import activation_patching

from .conftest import logit_diff

ABLATIONS = ("zero", "mean", "resample")


def ablated_logits(model, task, ablation: str):
    """Logits of every prompt with every head ablated, by plain hooks, one run at a time: [prompt][layer][head]."""
    z = {row: {} for row in range(len(task))}
    for row, ids in enumerate(task.corrupted_ids if ablation == "resample" else task.clean_ids):
        model.run_with_hooks(
            torch.tensor([ids]), [("z", lambda act, hook, row=row: z[row].update({hook.name: act.clone()}))]
        )
    means = {name: torch.cat([z[row][name][0] for row in z]).mean(0) for name in z[0]}

    def replace(row: int, head: int):
        def hook_fn(act, hook):
            act[:, :, head] = {
                "zero": torch.zeros(act.shape[-1]),
                "mean": means[hook.name][head],
                "resample": z[row][hook.name][:, :, head],
            }[ablation]

        return hook_fn

    return [
        [
            [
                model.run_with_hooks(torch.tensor([ids]), [(f"blocks.{layer}.attn.hook_z", replace(row, head))])
                for head in range(model.n_heads)
            ]
            for layer in range(model.n_layers)
        ]
        for row, ids in enumerate(task.clean_ids)
    ]


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_leave_one_out_equals_plain_hooked_runs(tiny, mixed_task, ablation) -> None:
    logits = ablated_logits(tiny, mixed_task, ablation)
    expected = np.array(
        [
            [
                [
                    logit_diff(tiny(torch.tensor([ids])), mixed_task, row) - logit_diff(one, mixed_task, row)
                    for one in by
                ]
                for by in logits[row]
            ]
            for row, ids in enumerate(mixed_task.clean_ids)
        ]
    )
    found = heads.leave_one_out(tiny, mixed_task, ablation=ablation, per_prompt=True)
    assert found["effect"].dims == ("prompt", "layer", "head")
    np.testing.assert_allclose(found["effect"], expected, atol=1e-4)
    assert np.abs(expected).max() > 0.1  # something to compare
    mean = heads.leave_one_out(tiny, mixed_task, ablation=ablation, batch_size=2)
    np.testing.assert_allclose(mean["effect"], expected.mean(0), atol=1e-4)
    assert mean.attrs["ablation"] == ablation


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_leave_one_out_is_noising_the_head(tiny, task, ablation) -> None:
    patched = activation_patching(
        tiny, task, site="z", by=("layer", "head"), direction="noise", ablation=ablation, normalised=False
    )
    np.testing.assert_allclose(heads.leave_one_out(tiny, task, ablation=ablation)["effect"], patched, atol=1e-4)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_kl_equals_scipy(tiny, mixed_task, ablation) -> None:
    logits = ablated_logits(tiny, mixed_task, ablation)
    found = heads.kl_importance(tiny, mixed_task, ablation=ablation, per_prompt=True)
    for row, ids in enumerate(mixed_task.clean_ids):
        clean = tiny(torch.tensor([ids]))[0, -1].double().softmax(-1).numpy()
        for layer in range(tiny.n_layers):
            for head in range(tiny.n_heads):
                ablated = logits[row][layer][head][0, -1].double().softmax(-1).numpy()
                expected = stats.entropy(clean, ablated)
                assert float(found["effect"][row, layer, head]) == pytest.approx(expected, rel=1e-2, abs=1e-5)
    assert found.attrs["ablation"] == ablation


def gate_differences(model, task, step: float = 5e-3) -> np.ndarray:
    """Change of each prompt's log-probability with a real gate on a head, by central differences."""
    found = np.zeros((len(task), model.n_layers, model.n_heads))
    for row, ids in enumerate(task.clean_ids):
        for layer in range(model.n_layers):
            for head in range(model.n_heads):
                values = []
                for scale in (1 + step, 1 - step):
                    with model.edited(Edit(f"blocks.{layer}.attn.hook_z", heads=[head], scale=scale)):
                        log_probs = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
                    values.append(float(log_probs[task.answers[row, 0]]))
                found[row, layer, head] = (values[0] - values[1]) / (2 * step)
    return found


def test_gates_equal_finite_differences_of_a_real_gate(tiny, mixed_task) -> None:
    tiny.hf.double()
    expected = gate_differences(tiny, mixed_task)
    signed = heads.gradient_gates(tiny, mixed_task, signed=True, per_prompt=True)
    np.testing.assert_allclose(signed["effect"], expected, rtol=1e-3, atol=5e-4)
    absolute = heads.gradient_gates(tiny, mixed_task, per_prompt=True, batch_size=1)
    np.testing.assert_allclose(absolute["effect"], np.abs(expected), rtol=1e-3, atol=5e-4)
    # The absolute value is taken before the mean over prompts: signs differ between prompts, so this is another number.
    mean = heads.gradient_gates(tiny, mixed_task)["effect"]
    np.testing.assert_allclose(mean, np.abs(expected).mean(0), rtol=1e-3, atol=5e-4)
    assert (np.abs(expected).mean(0) - np.abs(expected.mean(0))).max() > 1e-2


def test_gates_of_the_tasks_own_metric(tiny, task) -> None:
    found = heads.gradient_gates(tiny, task, metric="logit_diff", signed=True, per_prompt=True)["effect"]
    step, layer, head, row = 1e-2, 1, 2, 0
    values = []
    for scale in (1 + step, 1 - step):
        with tiny.edited(Edit(f"blocks.{layer}.attn.hook_z", heads=[head], scale=scale)):
            values.append(logit_diff(tiny(task.clean[[row]]), task, row))
    assert float(found[row, layer, head]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2, abs=1e-3)


def test_intervals_are_those_of_the_mean_over_prompts(tiny, task) -> None:
    per_prompt = heads.leave_one_out(tiny, task, ablation="zero", per_prompt=True)
    low, high = bootstrap_interval(per_prompt["effect"].values)
    for found in (per_prompt, heads.leave_one_out(tiny, task, ablation="zero")):
        np.testing.assert_allclose(found["low"], low, atol=1e-5)
        np.testing.assert_allclose(found["high"], high, atol=1e-5)
        assert found["low"].dims == ("layer", "head")


def test_one_prompt_has_no_interval(tiny, task) -> None:
    found = heads.leave_one_out(tiny, task[:1], ablation="zero")
    assert np.isnan(found["low"]).all()
    assert np.isfinite(found["effect"]).all()


def test_unknown_ablation_and_metric_are_named(tiny, task) -> None:
    with pytest.raises(ValueError, match="'noise'; it is one of zero, mean, resample"):
        ablate_heads.__wrapped__(tiny, task, "noise", METRICS["logit_diff"])
    with pytest.raises(ValueError, match="did you mean 'logit_diff'"):
        heads.leave_one_out(tiny, task, metric="logit_dif")
