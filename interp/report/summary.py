"""What was found, in sentences made of the study's numbers."""

from __future__ import annotations

import numpy as np
import xarray as xr

from interp.metrics import bootstrap_interval
from interp.report.agreement import agreement_matrix
from interp.report.figures import head_label
from interp.report.measures import extreme_heads, measure_title, measures_in, metric_unit, signed_number
from interp.report.page import Markup, joined, token


def summary_sentences(study: xr.Dataset) -> list[str]:
    """The behaviour, the heads that matter, where the information is, and how far the measures agree."""
    writers = [_writers(study)] if "direct" in study else []
    return [_behaviour(study), _important(study), *writers, _where(study), _trust(study)]


def _behaviour(study: xr.Dataset) -> str:
    n = study.sizes["prompt"]
    right = int(study["correct"].sum())
    clean, corrupted = (_interval(study[f"{run}_metric"].values) for run in ("clean", "corrupted"))
    return (
        f"{study.attrs['model']} prefers the right answer in {right} of {n} prompts: {metric_unit(study)} {clean} on "
        f"clean prompts and {corrupted} on corrupted ones (mean, 95% interval over prompts)."
    )


def _important(study: xr.Dataset) -> str:
    effects = study["importance_resample"]
    best, *others = extreme_heads(effects, 4, 0)
    largest = np.sort(np.abs(effects.values).ravel())[::-1]
    half = int(np.searchsorted(np.cumsum(largest), largest.sum() / 2)) + 1
    against = extreme_heads(effects, 0, 1) if (effects.values < 0).any() else []
    tail = f" {_with_role(study, *against[0])} works hardest against it." if against else ""
    lowered = [f"{_with_role(study, *one)} by {effects.values[one]:.2f}" for one in others]
    return (
        f"Replaced by its output on the corrupted prompt, {_with_role(study, *best)} lowers the {metric_unit(study)} "
        f"by {effects.values[best]:.2f}; {_listed(lowered)}. {half} of {effects.size} heads make up half of all the "
        f"change that single heads make.{tail}"
    )


def _writers(study: xr.Dataset) -> str:
    (most, second), (least,) = extreme_heads(study["direct"], 2, 0), extreme_heads(study["direct"], 0, 1)
    best, next_best, worst = (
        f"{head_label(*one)} ({signed_number(float(study['direct'].values[one]))})" for one in (most, second, least)
    )
    return (
        f"{best} and {next_best} write the answer most directly into the logit difference; {worst} writes most "
        "against it."
    )


def _where(study: xr.Dataset) -> str:
    values = study["patch_resid_pre"]
    best = values.values.argmax(1)
    position = int(best[0])
    stays = int(np.argmax(best != position)) if (best != position).any() else len(best)
    end = int(best[-1])
    labels = values["label"].values
    if stays == len(best):
        return joined(["What tells the prompts apart stays at", token(str(labels[position])), "to the last layer."])
    arrives = int(np.argmax(values.values[:, end] > 0.5))
    return joined(
        ["What tells the prompts apart stands at", token(str(labels[position])),
         Markup(f"up to layer {stays - 1}; patching the residual stream at"), token(str(labels[end])),
         f"restores more than half of the behaviour from layer {arrives} on."]
    )  # fmt: skip


def _trust(study: xr.Dataset) -> str:
    names = [name for name in measures_in(study) if name != "importance_resample"]
    matrix = agreement_matrix({name: abs(study[name]) for name in ["importance_resample", *names]})
    found = {name: float(matrix.sel(measure="importance_resample", other=name)) for name in names}
    found = {name: value for name, value in found.items() if np.isfinite(value)}
    if not found:
        return "Only one measure of importance is defined here."
    best, worst = max(found, key=found.__getitem__), min(found, key=found.__getitem__)
    return (
        f"In the size of effects, {measure_title(best)} ranks heads most as resample ablation does (Spearman "
        f"{found[best]:.2f}), {measure_title(worst)} least ({found[worst]:.2f}).".replace("-0", "−0")
    )


def _with_role(study: xr.Dataset, layer: int, head: int) -> str:
    role = str(study["role"].sel(layer=layer, head=head).values)
    return f"{head_label(layer, head)} ({role})" if role else head_label(layer, head)


def _interval(values: np.ndarray) -> str:
    low, high = bootstrap_interval(values)
    return f"{values.mean():.2f} [{float(low):.2f}, {float(high):.2f}]".replace("-", "−")


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
