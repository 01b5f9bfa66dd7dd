"""What the measures of a head are called, in which unit they are, and which heads they put first."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import xarray as xr

from interp.report.figures import head_label

MEASURES: dict[str, str] = {
    "importance_resample": "resample ablation",
    "importance_mean": "mean ablation",
    "importance_zero": "zero ablation",
    "kl_mean": "KL of mean ablation",
    "gate_signed": "signed gate gradient",
    "gate": "gate gradient",
    "direct": "direct effect",
}
"""Measures of importance that are compared, exact ones first; names as in `interp.heads.table`."""

SIGNED = ("importance_resample", "importance_mean", "importance_zero", "gate_signed", "direct")
"""Those that tell a head for the behaviour from one against it."""

_OTHER_TITLES = {
    "kl_resample": "KL of resample ablation",
    "kl_zero": "KL of zero ablation",
    "copying_eigenvalues": "copying (eigenvalues)",
    "copying_top_k": "copying (top 5)",
    "negative_copying_top_k": "negative copying (top 5)",
    "patch_pattern": "pattern patch",
}

_UNITS = {
    "logit_diff": "logit difference",
    "prob_diff": "probability difference",
    "log_prob": "log-probability of the answer",
    "accuracy": "accuracy",
    "answer_rank": "rank of the answer",
}


def measure_title(name: str) -> str:
    """How a variable of a study is called in text."""
    return {**MEASURES, **_OTHER_TITLES}.get(name, name.replace("_", " "))


def measures_in(study: xr.Dataset) -> list[str]:
    """The measures of importance that a study holds, in the order of `MEASURES`."""
    return [name for name in MEASURES if name in study]


def metric_unit(study: xr.Dataset) -> str:
    """What the task's metric is called in text."""
    return _UNITS.get(str(study.attrs["metric"]), str(study.attrs["metric"]))


def extreme_heads(values: xr.DataArray, n_highest: int, n_lowest: int) -> list[tuple[int, int]]:
    """(layer, head) of the highest values, highest first, then of the lowest, lowest last; NaN is left out.

    Args:
        values: [layer, head].
        n_highest: how many from the top.
        n_lowest: how many from the bottom; none of them is among the highest.
    """
    flat = values.values.ravel()
    order = [int(one) for one in np.argsort(-flat, kind="stable") if np.isfinite(flat[one])]
    chosen = order[:n_highest] + order[n_highest:][-n_lowest:] if n_lowest else order[:n_highest]
    return [divmod(one, values.shape[1]) for one in chosen]


def signed_number(value: float) -> str:
    """A number with its sign, for text: "+1.28", "−0.40"."""
    return f"{value:+.2f}".replace("-", "−")


def percent(share: float) -> str:
    """A share, for text: "12%", "−3%"."""
    return f"{share:.0%}".replace("-", "−")


def effect_unit(study: xr.Dataset) -> str:
    """The unit of an ablation's effect."""
    return f"{metric_unit(study)} lost"


def counted(values: xr.DataArray) -> str:
    """On how many prompts a variable was measured."""
    return f"n = {int(values.attrs['n_prompts'])} prompts"


class Interval(TypedDict):
    """The ends of an interval, as the keyword arguments that figures take."""

    low: xr.DataArray
    high: xr.DataArray


def interval(study: xr.Dataset, name: str) -> Interval:
    """The interval of a measure."""
    return {"low": study[f"{name}_low"], "high": study[f"{name}_high"]}


def head_labels(study: xr.Dataset) -> list[str]:
    """Every head's label, in the order of flattened [layer, head] values."""
    return [head_label(*place) for place in np.ndindex(study.sizes["layer"], study.sizes["head"])]


def best_heads(study: xr.Dataset, name: str, count: int = 2) -> str:
    """The heads of highest value in words: "L9H6 and L9H9"."""
    labels = [head_label(*place) for place in extreme_heads(study[name], count, 0)]
    return ", ".join(labels[:-1]) + f" and {labels[-1]}" if len(labels) > 1 else labels[0]
