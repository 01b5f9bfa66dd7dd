"""ACT's offline search: which heads, calibrated one at a time, raise a metric on held-out prompts.

A head's pattern does not depend on its own calibration, so the hidden sinks of all heads come from one plain run a
prompt; each candidate is then one variant of the sweep engine, which starts at the candidate's layer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from interp.heads import attention_received
from interp.metrics import Metric, bootstrap_interval
from interp.model import Edit, Model, Site
from interp.patching import Variant, sweep
from interp.patching.activation import resolve_metric
from interp.patching.batching import batches
from interp.patching.labels import provenance
from interp.patching.reading import reading
from interp.sinks.calibration import ALPHA, BETA, KEEP, CalibrationRule, calibrated, head_selection, hidden_sink_keys
from interp.sinks.move import move_mass
from interp.tasks import Task

LEVEL = 0.95
LAYERS_A_SWEEP = 4
"""The engine holds the patterns of the layers that are edited: few layers at once, a plain run of the prompts each."""


@torch.no_grad()
def calibration_search(
    model: Model,
    task: Task,
    *,
    candidates: Bool[Tensor, "layer head"] | xr.DataArray | None = None,
    known: xr.Dataset | None = None,
    metric: str | Metric = "accuracy",
    beta: float = BETA,
    alpha: float = ALPHA,
    theta: float | None = None,
    keep: Sequence[int] = KEEP,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """The metric on a task's clean prompts with each candidate head calibrated alone.

    Costs one run a candidate and prompt, from the candidate's layer on (none where the head has no hidden sinks), and
    a plain run of the prompts for every four layers. To be able to stop, search some layers at a time and hand the
    result on as `known`.

    Args:
        model: the model.
        task: held-out prompts with answers; their corrupted twins play no part.
        candidates: which heads; None: all of layers 2 to n_layers − 2.
        known: an earlier result of the same search: its cells are taken over, not run again.
        metric: name or function; higher must be better.
        beta: as for `calibrated`.
        alpha: as for `calibrated`.
        theta: as for `calibrated`.
        keep: as for `calibrated`.
        batch_size: variants at once; by default what memory allows.
        progress: show progress bars; None: in a terminal or notebook only.

    Returns:
        Dataset [layer, head], NaN where a head was not tried: `metric`, its mean over prompts; `gain`, that minus the
        baseline, with `low` and `high`, its 95% bootstrap interval over prompts (of the paired differences). attrs:
        `baseline`, the metric of the model as it is, with `baseline_low` and `baseline_high`; task, settings.

    Raises:
        ValueError: for heads of another shape, or a `known` result of other settings.

    Source: Yu et al. 2024 (arXiv 2406.15765); their own selection script is not released. Checked against `calibrated`
    with one head at a time in tests/sinks/test_head_search.py.
    """
    started = time.perf_counter()
    rule = CalibrationRule(beta=beta, alpha=alpha, theta=theta, keep=tuple(keep))
    name, metric_fn = resolve_metric(metric, task)
    chosen = head_selection(model, _inner_heads(model) if candidates is None else candidates)
    attrs = {**provenance(model, task), "method": "calibration_search", "metric": name, **_settings(rule)}
    if known is not None:
        _check_known(known, attrs)
        chosen = chosen & torch.from_numpy(known["metric"].isnull().to_numpy())
    baseline = _prompt_metric(model, task, metric_fn, batch_size)
    found = torch.full((len(task), model.n_layers, model.n_heads), torch.nan, dtype=torch.float64)
    for group in task.by_length():
        found[group.index] = _group_metric(model, group, chosen, rule, metric_fn, batch_size, progress).double()
    result = _dataset(found, baseline, attrs)
    result = result if known is None else known.combine_first(result).assign_attrs(result.attrs)
    return result.assign_attrs(seconds=time.perf_counter() - started)


def raising_heads(found: xr.Dataset) -> xr.DataArray:
    """The heads whose calibration alone raised the metric: boolean [layer, head], for `calibrated`.

    Many of the gains are within their intervals: what the selection is worth shows on other prompts
    (`calibration_gain`).
    """
    return (found["gain"] > 0).rename("heads").assign_attrs(found.attrs)


@torch.no_grad()
def calibration_gain(
    model: Model,
    task: Task,
    heads: Bool[Tensor, "layer head"] | xr.DataArray,
    *,
    metric: str | Metric = "accuracy",
    beta: float = BETA,
    alpha: float = ALPHA,
    theta: float | None = None,
    keep: Sequence[int] = KEEP,
    batch_size: int | None = None,
) -> xr.Dataset:
    """The metric before and after calibration of all chosen heads together, on prompts that did not choose them.

    Costs two forward passes a prompt.

    Args:
        model: the model.
        task: validation prompts with answers; their corrupted twins play no part.
        heads: which heads, such as `raising_heads` returns.
        metric: name or function.
        beta: as for `calibrated`.
        alpha: as for `calibrated`.
        theta: as for `calibrated`.
        keep: as for `calibrated`.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.

    Returns:
        Dataset with `metric` [run, statistic] (run: before, after; statistic: mean, low, high of a 95% bootstrap over
        prompts), `gain` [statistic], the paired difference, and `prompt_metric` [run, prompt].
    """
    name, metric_fn = resolve_metric(metric, task)
    before = _prompt_metric(model, task, metric_fn, batch_size)
    with calibrated(model, heads, beta=beta, alpha=alpha, theta=theta, keep=keep):
        after = _prompt_metric(model, task, metric_fn, batch_size)

    def statistics(values: Tensor) -> list[float]:
        low, high = bootstrap_interval(values, level=LEVEL)
        return [float(values.mean()), float(low), float(high)]

    return xr.Dataset(
        {
            "metric": (("run", "statistic"), [statistics(before), statistics(after)]),
            "gain": (("statistic",), statistics(after - before)),
            "prompt_metric": (("run", "prompt"), torch.stack([before, after]).numpy()),
        },
        coords={"run": ["before", "after"], "statistic": ["mean", "low", "high"], "prompt": range(len(task))},
        attrs={
            **provenance(model, task),
            "method": "calibration_gain",
            "metric": name,
            "n_heads_calibrated": int(head_selection(model, heads).sum()),
            **_settings(CalibrationRule(beta=beta, alpha=alpha, theta=theta, keep=tuple(keep))),
        },
    )


def _inner_heads(model: Model) -> Bool[Tensor, "layer head"]:
    """All heads of layers 2 to n_layers − 2, those that were searched in the source."""
    layer = torch.arange(model.n_layers)
    return ((layer >= 2) & (layer <= model.n_layers - 2))[:, None].repeat(1, model.n_heads)


def _settings(rule: CalibrationRule) -> dict[str, Any]:
    """What attrs say of the calibration; all of it survives netCDF."""
    return {
        "beta": rule.beta,
        "alpha": rule.alpha,
        "theta": "alpha / N" if rule.theta is None else rule.theta,
        "keep": " ".join(map(str, rule.keep)),
        "interval": LEVEL,
    }


def _check_known(known: xr.Dataset, attrs: dict[str, Any]) -> None:
    """Refuse an earlier result of another model, task or setting."""
    for name, value in attrs.items():
        stored = known.attrs.get(name)
        if stored != value:
            raise ValueError(f"the known result has {name} = {stored}, this search {value}: leave it out")


def _prompt_metric(model: Model, task: Task, metric: Metric, batch_size: int | None) -> Float[Tensor, " prompt"]:
    """The metric of each clean prompt, in the order of the task."""
    values = torch.empty(len(task), dtype=torch.float64)
    for group in task.by_length():
        read = reading(metric, group)
        for rows in batches(len(group), group.clean.shape[1], batch_size):
            prompt = torch.arange(len(group))[rows]
            values[group.index[rows]] = read.of_all(model.last_logits(group.clean[rows]), prompt).double()
    return values


def _group_metric(
    model: Model,
    group: Task,
    chosen: Bool[Tensor, "layer head"],
    rule: CalibrationRule,
    metric: Metric,
    batch_size: int | None,
    progress: bool | None,
) -> Float[Tensor, "prompt layer head"]:
    """The metric of each prompt of one length with each chosen head calibrated alone; NaN for the others."""
    found = torch.full((len(group), *chosen.shape), torch.nan, dtype=torch.float64)
    read = reading(metric, group)
    layers = chosen.any(1).nonzero()[:, 0].tolist()
    if not layers:
        return found
    sinks = _hidden_sinks(model, group, layers, rule, batch_size, progress)
    for begin in range(0, len(layers), LAYERS_A_SWEEP):
        some = layers[begin : begin + LAYERS_A_SWEEP]
        cells = [
            (prompt, layer, head)
            for prompt in range(len(group))
            for layer in some
            for head in chosen[layer].nonzero()[:, 0].tolist()
        ]
        donors = [sinks[prompt, layers.index(layer), head] for prompt, layer, head in cells]
        values = sweep(
            model,
            group.clean,
            [_variant(*cell, one, rule) for cell, one in zip(cells, donors, strict=True)],
            read,
            columns=read.columns,
            batch_size=batch_size,
            progress=progress,
            description=f"calibrating heads of layers {some[0]}-{some[-1]}",
        )
        found[tuple(torch.tensor(cells).T)] = values.double()
    return found


def _hidden_sinks(
    model: Model,
    group: Task,
    layers: Sequence[int],
    rule: CalibrationRule,
    batch_size: int | None,
    progress: bool | None,
) -> Bool[Tensor, "prompt layer head pos"]:
    """The hidden sinks of the heads of some layers on prompts of one length."""
    received = attention_received(model, group.clean, layers=layers, batch_size=batch_size, progress=progress)
    scores = torch.from_numpy(received.transpose("prompt", "layer", "head", "position").to_numpy())
    keep = torch.isin(torch.arange(scores.shape[-1]), torch.tensor(rule.keep))[None]
    found = hidden_sink_keys(scores.flatten(1, 2), keep, alpha=rule.alpha, theta=rule.theta)
    return found.view(scores.shape)


def _variant(prompt: int, layer: int, head: int, donors: Bool[Tensor, " pos"], rule: CalibrationRule) -> Variant:
    """One prompt with one head calibrated."""

    def calibrate(pattern: Tensor) -> Tensor:
        here = donors.to(pattern.device)[None, None]
        return move_mass(pattern[:, head : head + 1], here, ~here, 1 - rule.beta)

    return Variant(prompt, (Edit(Site("pattern", layer), heads=[head], fn=calibrate),))


def _dataset(
    values: Float[Tensor, "prompt layer head"], baseline: Float[Tensor, " prompt"], attrs: dict[str, Any]
) -> xr.Dataset:
    gain = values - baseline[:, None, None]
    low, high = bootstrap_interval(gain, level=LEVEL)
    base_low, base_high = bootstrap_interval(baseline, level=LEVEL)
    variables = {"metric": values.mean(0).numpy(), "gain": gain.mean(0).numpy(), "low": low, "high": high}
    return xr.Dataset(
        {name: (("layer", "head"), one.astype(np.float32)) for name, one in variables.items()},
        coords={"layer": range(values.shape[1]), "head": range(values.shape[2])},
        attrs={
            **attrs,
            "baseline": float(baseline.mean()),
            "baseline_low": float(base_low),
            "baseline_high": float(base_high),
        },
    )
