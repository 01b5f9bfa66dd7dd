"""How much each head matters for a behaviour: by taking it out, or by the gradient of a gate on it.

The measures disagree, zero ablation most of all (it overstates early layers), so every result names its ablation.
"""

from __future__ import annotations

import time

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.heads.ablation import ablate_heads
from interp.heads.effects import effect_dataset, in_prompt_order
from interp.metrics import Metric
from interp.model import Model
from interp.patching.activation import Ablation, resolve_metric
from interp.patching.batching import batches
from interp.tasks import Task


def leave_one_out(
    model: Model,
    task: Task,
    *,
    ablation: Ablation = "mean",
    metric: str | Metric | None = None,
    per_prompt: bool = False,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Exact loss of the metric when one head is ablated at all positions: metric(clean) − metric(ablated).

    Positive = the head supports the behaviour. Costs layers × heads forward passes a prompt.

    Args:
        model: the model.
        task: the behaviour.
        ablation: what the head's z becomes: "zero"; "mean" over prompts and positions of the clean runs; "resample":
            that of the corrupted prompt.
        metric: name in `interp.metrics.METRICS` or a function; the task's own by default.
        per_prompt: keep a `prompt` axis in `effect`.
        batch_size: rows a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset [layer, head] of `effect`, in the metric's units, with `low` and `high`, its 95% bootstrap interval.
    """
    started = time.perf_counter()
    name, metric_fn = resolve_metric(metric, task)
    found = ablate_heads(model, task, ablation, metric_fn, batch_size=batch_size, progress=progress)
    attrs = {
        "method": "leave_one_out",
        "ablation": ablation,
        "metric": name,
        "metric_clean": float(found.clean.mean()),
        "seconds": time.perf_counter() - started,
    }
    return effect_dataset(found.effect, ("layer", "head"), model, task, attrs, per_prompt=per_prompt)


def kl_importance(
    model: Model,
    task: Task,
    *,
    ablation: Ablation = "mean",
    per_prompt: bool = False,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """KL(p ‖ p without the head) of the next-token distribution at the answer position, mean over prompts, in nats.

    Says how much the prediction changes, not in which direction. Only the last position counts, where the answer is
    predicted. Costs layers × heads forward passes a prompt.

    Args:
        model: the model.
        task: its clean prompts.
        ablation: as for `leave_one_out`.
        per_prompt: keep a `prompt` axis in `effect`.
        batch_size: rows a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset [layer, head] of `effect`, with `low` and `high`, its 95% bootstrap interval.
    """
    started = time.perf_counter()
    _, metric_fn = resolve_metric(None, task)
    found = ablate_heads(model, task, ablation, metric_fn, batch_size=batch_size, progress=progress)
    attrs = {
        "method": "kl_importance",
        "ablation": ablation,
        "metric": "kl_divergence",
        "position": "END",
        "seconds": time.perf_counter() - started,
    }
    return effect_dataset(found.kl, ("layer", "head"), model, task, attrs, per_prompt=per_prompt)


def gradient_gates(
    model: Model,
    task: Task,
    *,
    metric: str | Metric = "log_prob",
    signed: bool = False,
    per_prompt: bool = False,
    batch_size: int | None = None,
) -> xr.Dataset:
    """Sensitivity to a gate on each head: E |∂m/∂ξ|, where ξ = 1 multiplies z at all positions of a prompt.

    ∂m/∂ξ = Σ over tokens of ⟨z, ∂m/∂z⟩. The absolute value is taken after the sum over tokens and before the mean over
    prompts. Costs one forward and one backward pass a prompt, for all heads together; first order in the gate.

    Args:
        model: the model.
        task: the behaviour, on clean prompts.
        metric: a differentiable metric. "log_prob" of the answer is minus the loss of the original method; the absolute
            value is the same.
        signed: without the absolute value: the first-order estimate of metric(clean) − metric(zero ablation), positive
            = the head supports the behaviour.
        per_prompt: keep a `prompt` axis in `effect`.
        batch_size: prompts a pass; by default about a thousand tokens' worth.

    Returns:
        Dataset [layer, head] of `effect`, in the metric's units, with `low` and `high`, its 95% bootstrap interval.

    Source: Michel et al. 2019 (arXiv 1905.10650), Eq. 2. Checked against finite differences of a real gate in
    tests/heads/test_importance.py.
    """
    started = time.perf_counter()
    name, metric_fn = resolve_metric(metric, task)
    gates = gate_gradients(model, task, metric_fn, batch_size=batch_size)
    attrs = {
        "method": "gradient_gates",
        "ablation": "none (gradient of a gate)",
        "metric": name,
        "signed": int(signed),
        "seconds": time.perf_counter() - started,
    }
    values = gates if signed else gates.abs()
    return effect_dataset(values, ("layer", "head"), model, task, attrs, per_prompt=per_prompt)


def gate_gradients(
    model: Model, task: Task, metric: Metric, *, batch_size: int | None = None
) -> Float[Tensor, "prompt layer head"]:
    """∂m/∂ξ of each prompt's own metric, products accumulated in float32."""
    groups = task.by_length()
    parts = []
    for group in groups:
        for rows in batches(len(group), group.clean.shape[1], batch_size):
            answers, wrong = (ids[rows].to(model.device) for ids in (group.answers, group.wrong))

            def value(logits: Tensor, answers: Tensor = answers, wrong: Tensor = wrong) -> Tensor:
                return metric(logits[:, -1], answers, wrong)

            _, z, gradient = model.run_with_gradients(group.clean[rows], value, "z", logits_to_keep=1)
            by_layer = [
                (z["z", layer].float() * gradient["z", layer].float()).sum((1, 3)).cpu()
                for layer in range(model.n_layers)
            ]
            parts.append(torch.stack(by_layer, dim=1))
    return in_prompt_order(groups, parts)
