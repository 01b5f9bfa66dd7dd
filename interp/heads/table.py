"""Everything about every head of a model on one task, in one table."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.heads.ablation import ABLATIONS, HeadAblation, ablate_heads
from interp.heads.copying import copying_eigenvalues, copying_top_k
from interp.heads.direct import direct_logit_attribution
from interp.heads.effects import effect_dataset
from interp.heads.importance import gate_gradients
from interp.heads.patterns import SCORES, pattern_scores, planted_tokens
from interp.heads.roles import roles
from interp.heads.statistics import STATISTICS, attention_statistics, end_attention
from interp.metrics import METRICS, PADDING, Metric
from interp.model import Model, SiteUnavailable, UnsupportedModel
from interp.patching.activation import Ablation, resolve_metric
from interp.patching.labels import provenance
from interp.tasks import Task

_log = logging.getLogger(__name__)

Columns = dict[str, Any]
"""Column name -> values over [layer, head]."""


def table(
    model: Model,
    task: Task,
    *,
    ablations: Sequence[Ablation] = ABLATIONS,
    metric: str | Metric | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """One row a head: importance, direct effect, attention, copying, and a role where the evidence is enough.

    Costs layers × heads forward passes a prompt and ablation, which give importance and KL together, and little besides
    (the patterns on random tokens cost 12 passes of 100 tokens).

    | columns | what |
    |---|---|
    | `layer`, `head`, `role` | see `interp.heads.roles` |
    | `importance_mean`, ... `_low`, `_high` | `leave_one_out` by ablation, with its 95% interval over prompts |
    | `kl_mean`, ... `_low`, `_high` | `kl_importance` by ablation |
    | `gate`, `gate_signed`, each with `_low`, `_high` | `gradient_gates` |
    | `direct`, `direct_low`, `direct_high` | `direct_logit_attribution` |
    | `previous_token` ... `first_token` | `pattern_scores`, on repeated random tokens |
    | `entropy`, `distance`, `first_token_mass` | `attention_statistics`, on the clean prompts |
    | `end_to_IO`, ..., `end_to_answer`, `end_to_wrong` | `end_attention` |
    | `copying_eigenvalues`, `copying_top_k`, `negative_copying_top_k` | `copying_eigenvalues`, `copying_top_k` |

    Args:
        model: the model.
        task: the behaviour.
        ablations: which ablations to run; roles go by "mean" if it is among them, by the first otherwise.
        metric: name in `interp.metrics.METRICS` or a function; the task's own by default.
        seed: of the random tokens.
        batch_size: rows a forward pass; by default about a thousand tokens' worth.
        progress: show progress bars; None: in a terminal or notebook only.

    Returns:
        DataFrame indexed by "L9H6". `attrs` say how it was made, `attrs["seconds"]` how long each part took, and
        `attrs["unavailable"]` why columns are missing that the model or task cannot have.
    """
    name, metric_fn = resolve_metric(metric, task)
    work = _Work(model, task, metric_fn, seed, batch_size, progress)
    for ablation in ablations:
        work.do(f"{ablation} ablation", partial(work.ablation, ablation))
    for part, columns in (
        ("gates", work.gates),
        ("direct effects", work.direct),
        ("pattern scores", work.patterns),
        ("attention", work.attention),
        ("copying", work.copying),
    ):
        work.do(part, columns)
    frame = _frame(model, work.columns)
    importance = f"importance_{'mean' if 'mean' in ablations else ablations[0]}" if ablations else ""
    frame.insert(
        2,
        "role",
        roles(
            frame,
            importance=importance,
            metric_clean=work.about.get("metric_clean", float("nan")),
            logit_diff_clean=work.about.get("logit_diff_clean", float("nan")),
        ),
    )
    about = {
        **provenance(model, task),
        "method": "table",
        "metric": name,
        "ablation": ", ".join(ablations),
        "roles_by": importance,
        "pattern_seed": seed,
        **work.about,
        "seconds": work.seconds,
        "unavailable": work.unavailable,
    }
    for key, value in about.items():
        frame.attrs[key] = value
    return frame


@dataclass
class _Work:
    """The parts of one table: what each needs, and what came of it."""

    model: Model
    task: Task
    metric: Metric
    seed: int
    batch_size: int | None
    progress: bool | None
    columns: Columns = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    about: dict[str, float] = field(default_factory=dict)

    def do(self, part: str, columns: Callable[[], Columns]) -> None:
        """Compute the columns of a part; if the model cannot have them, keep the reason."""
        started = time.perf_counter()
        try:
            self.columns |= columns()
        except (UnsupportedModel, SiteUnavailable) as reason:
            self.unavailable[part] = str(reason)
        self.seconds[part] = time.perf_counter() - started
        _log.info("%s: %.1f s", part, self.seconds[part])

    def ablation(self, ablation: Ablation) -> Columns:
        found: HeadAblation = ablate_heads(
            self.model, self.task, ablation, self.metric, batch_size=self.batch_size, progress=self.progress
        )
        self.about["metric_clean"] = float(found.clean.mean())
        return self.with_interval(f"importance_{ablation}", found.effect) | self.with_interval(
            f"kl_{ablation}", found.kl
        )

    def gates(self) -> Columns:
        gates = gate_gradients(self.model, self.task, METRICS["log_prob"], batch_size=self.batch_size)
        return self.with_interval("gate", gates.abs()) | self.with_interval("gate_signed", gates)

    def direct(self) -> Columns:
        if bool((self.task.wrong == PADDING).all(-1).any()):
            self.unavailable["direct effects"] = "a prompt has no wrong answer: no logit difference to attribute"
            return {}
        found = direct_logit_attribution(self.model, self.task, batch_size=self.batch_size)
        self.about["logit_diff_clean"] = found.attrs["metric_clean"]
        return _renamed("direct", found)

    def patterns(self) -> Columns:
        try:
            tokens = planted_tokens(self.model, seed=self.seed)
        except ValueError as reason:  # a small model of few words
            self.unavailable["pattern scores"] = str(reason)
            return {}
        scores = pattern_scores(self.model, tokens, batch_size=self.batch_size, progress=self.progress)
        return {name: scores[name].values for name in SCORES}

    def attention(self) -> Columns:
        statistics = attention_statistics(self.model, self.task, batch_size=self.batch_size, progress=self.progress)
        from_end = end_attention(self.model, self.task, batch_size=self.batch_size, progress=self.progress)
        columns = {name: statistics[name].values for name in STATISTICS}
        return columns | {f"end_to_{name}": from_end.sel(target=name).values for name in from_end.target.values}

    def copying(self) -> Columns:
        top = copying_top_k(self.model, self.task)
        return {
            "copying_eigenvalues": copying_eigenvalues(self.model).values,
            "copying_top_k": top["copying"].values,
            "negative_copying_top_k": top["negative"].values,
        }

    def with_interval(self, name: str, values: Float[Tensor, "prompt layer head"]) -> Columns:
        found = effect_dataset(values, ("layer", "head"), self.model, self.task, {}, per_prompt=False)
        return _renamed(name, found)


def _renamed(name: str, found: xr.Dataset) -> Columns:
    return {name: found["effect"].values, f"{name}_low": found["low"].values, f"{name}_high": found["high"].values}


def _frame(model: Model, columns: Columns) -> pd.DataFrame:
    places = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    return pd.DataFrame(
        {
            "layer": [layer for layer, _ in places],
            "head": [head for _, head in places],
            **{name: values.reshape(-1) for name, values in columns.items()},
        },
        index=[f"L{layer}H{head}" for layer, head in places],
    )
