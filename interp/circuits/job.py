"""`run_job`: circuits of several models, tasks and methods as one job that can be stopped and goes on.

A cell is one method on one task on one model. For each the job

1. finds the circuit on n prompts;
2. tests it on others: faithfulness, KL and accuracy of the circuit, and the faithfulness curve with CPR and CMD;
3. writes `<model>/<task>/<method>/` with `circuit.json`, `curve.csv` and `cell.json`, and at the end `summary.csv`.

A job that was killed goes on with the same call: cells that are finished are taken from their files if model, prompts,
choices and versions are the same, all others are computed. Files hold nothing that differs between two runs on one
machine (no seconds, no dates), so that a job that was killed and went on leaves the bytes of one that was not. On a GPU
this holds as far as the model's own passes repeat exactly. One job at a time writes to a folder: another is refused.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from tqdm.auto import tqdm

from interp.circuits.cell_files import (
    digest_of,
    model_content,
    read_cell,
    remove_leftovers,
    task_content,
    write_cell,
)
from interp.circuits.circuit import Circuit
from interp.circuits.discover import discover
from interp.circuits.evaluate import evaluate
from interp.circuits.storage import save
from interp.circuits.sweep_file import Sweep, model_label, task_label
from interp.model import Model
from interp.model.load import load
from interp.patching.progress import progress_bar
from interp.patching.writing import only_writer, replace_text
from interp.tasks import TASKS, Task, read

logger = logging.getLogger(__name__)

T = TypeVar("T")

SUMMARY = "summary.csv"
OWN = ("faithfulness", "kl", "accuracy")
MEASURES = ("n_edges", "n_nodes", "cpr", "cmd", *OWN, "metric_model", "metric_empty")
"""Columns of the summary after model, task and method; `error` is the last one."""


@dataclass(frozen=True)
class _Failed:
    """Stands for what could not be had."""

    error: str


@dataclass(frozen=True)
class _Loaded:
    model: Model
    content: Mapping[str, Any]


@dataclass(frozen=True)
class _Prompts:
    found_on: Task
    tested_on: Task


@dataclass(frozen=True)
class _Cell:
    """What a cell's files hold."""

    circuit: Circuit
    curve: xr.Dataset
    measures: Mapping[str, float | None]

    def write(self, folder: Path) -> None:
        save(self.circuit, folder / "circuit.json")
        along = [name for name, one in self.curve.items() if one.ndim]
        frame = self.curve[along].to_dataframe().reset_index()
        (folder / "curve.csv").write_text(
            frame.to_csv(index=False, lineterminator="\n"), encoding="utf-8", newline="\n"
        )


def run_job(
    sweep: str | os.PathLike[str] | Mapping[str, Any] | Sweep,
    out: str | os.PathLike[str],
    *,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Find and test circuits: every method on every task on every model.

    >>> run_job("sweep.toml", "circuits/")

    A cell that fails (a method that does not know the model, say) has its error in the summary and does not stop the
    others; the next call tries it again. Cells of an earlier sweep stay in the folder until they are replaced.

    Args:
        sweep: a TOML file, or a mapping with its fields: see `interp.circuits.sweep_file`.
        out: the folder to write to; it is made if need be, in a folder that exists.
        progress: show progress bars, with the remaining time; None: in a terminal or notebook only.

    Returns:
        The rows of `summary.csv`, one a cell, with `seconds` of the cells that were computed by this call. `cpr` and
        `cmd` are of the curve; `faithfulness`, `kl` and `accuracy` of the circuit itself.

    Raises:
        ValueError: naming the field, for a sweep that cannot be run.
        FileNotFoundError: if the sweep, a task file of it, or the folder around `out` does not exist.
        BlockingIOError: if another job is writing to `out`.
    """
    plan, folder = sweep if isinstance(sweep, Sweep) else Sweep.of(sweep), Path(out)
    folder.mkdir(exist_ok=True)
    with only_writer(folder):
        remove_leftovers(folder)
        rows = _rows(plan, folder, progress)
        kinds = dict.fromkeys(MEASURES, "float64") | {"n_edges": "Int64", "n_nodes": "Int64"}  # a failed cell has none
        frame = pd.DataFrame(rows).astype(kinds)
        replace_text(frame.drop(columns="seconds").to_csv(index=False, lineterminator="\n"), folder / SUMMARY)
    return frame


def _rows(plan: Sweep, folder: Path, progress: bool | None) -> list[dict[str, Any]]:
    """The rows of all cells, one model after the other."""
    rows = []
    with progress_bar(len(plan.cells), "cells", "cell", progress=progress) as bar:
        for source in plan.models:
            loaded = _attempt(partial(_load, source, plan))
            for task in plan.tasks:
                prompts = (
                    loaded if isinstance(loaded, _Failed) else _attempt(partial(_prompts, loaded.model, task, plan))
                )
                for method in plan.methods:
                    names = {"model": model_label(source), "task": task_label(task), "method": method}
                    rows.append(_row(plan, folder, names, loaded, prompts, bar, progress))
            del loaded  # before the next one is
    return rows


def _row(
    plan: Sweep,
    out: Path,
    names: dict[str, str],
    loaded: _Loaded | _Failed,
    prompts: _Prompts | _Failed,
    bar: tqdm,
    progress: bool | None,
) -> dict[str, Any]:
    """A row of the summary: from the cell's files, or computed and written."""
    folder, title = out.joinpath(*names.values()), " ".join(names.values())
    bar.set_description(title)
    if isinstance(loaded, _Failed):
        return _failed_row(names, loaded, bar)
    if isinstance(prompts, _Failed):
        return _failed_row(names, prompts, bar)
    tasks = [task_content(task) for task in (prompts.found_on, prompts.tested_on)]
    digest = digest_of({"cell": names, "choices": plan.choices, "model": loaded.content, "tasks": tasks})
    stored = read_cell(folder, digest)
    if stored is not None:
        logger.info("%s: taken from %s", title, folder)
        _pass_over(bar)
        return names | stored["measures"] | {"error": "", "seconds": np.nan}
    started = time.perf_counter()
    cell = _attempt(partial(_compute, loaded.model, prompts, plan, names["method"], progress))
    if isinstance(cell, _Failed):
        return _failed_row(names, cell, bar)
    write_cell(folder, digest, {**names, "choices": plan.choices, "measures": cell.measures}, cell.write)
    bar.update()
    seconds = time.perf_counter() - started
    logger.info("%s: %.1f s", title, seconds)
    return names | dict(cell.measures) | {"error": "", "seconds": seconds}


def _failed_row(names: dict[str, str], failed: _Failed, bar: tqdm) -> dict[str, Any]:
    logger.warning("%s: %s", " ".join(names.values()), failed.error)
    bar.update()
    return names | dict.fromkeys(MEASURES, np.nan) | {"error": failed.error, "seconds": np.nan}


def _attempt(compute: Callable[[], T]) -> T | _Failed:
    """What is computed, or why it could not be."""
    try:
        return compute()
    except Exception as error:  # whatever goes wrong in a cell must not stop the others
        logger.debug("failed", exc_info=True)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        kind = "" if isinstance(error, ValueError) and lines else f"{type(error).__name__}: "
        return _Failed(kind + (lines[0] if lines else "no message"))


def _load(source: str, plan: Sweep) -> _Loaded:
    gc.collect()  # what is left of the model before
    model = load(source, device=plan.device, dtype=plan.dtype and getattr(torch, plan.dtype))
    return _Loaded(model, model_content(model))


def _prompts(model: Model, task: str, plan: Sweep) -> _Prompts:
    """Prompts to find circuits on, and others to test them on: one draw, cut in two."""
    needed = plan.n + plan.n_evaluation
    drawn = TASKS[task](model, needed, seed=plan.seed) if task in TASKS else read(model, task)[:needed]
    if len(drawn) < needed:
        raise ValueError(
            f"{task} has {len(drawn)} prompt pairs; n + n_evaluation is {needed} (n_evaluation = 0 tests on the pairs "
            "that circuits are found on)"
        )
    found_on = drawn[: plan.n]
    return _Prompts(found_on, drawn[plan.n :] if plan.n_evaluation else found_on)


def _compute(model: Model, prompts: _Prompts, plan: Sweep, method: str, progress: bool | None) -> _Cell:
    chosen = {name: plan.choices[name] for name in ("selection", "signed", "direction", "metric", "seed", "batch_size")}
    circuit = discover(model, prompts.found_on, method, **plan.limits(method), **chosen, progress=progress)
    timeless = {name: value for name, value in circuit.attrs.items() if name != "seconds"}
    circuit = replace(circuit, attrs=timeless)
    curve = evaluate(
        model,
        prompts.tested_on,
        circuit,
        sizes=plan.sizes,
        ablation=plan.ablation,
        metric=plan.metric,
        progress=progress,
    )
    measures: dict[str, float | None] = {
        "n_edges": circuit.n_edges,
        "n_nodes": len(circuit.nodes),
        **{name: curve.attrs[name] for name in ("metric_model", "metric_empty")},
        # A curve of one size has no area.
        **{name: None if np.isnan(curve.attrs[name]) else curve.attrs[name] for name in ("cpr", "cmd")},
        # A circuit without edges has none of these.
        **{name: float(curve[f"circuit_{name}"]) if circuit.n_edges else None for name in OWN},
    }
    return _Cell(circuit, curve, {name: measures[name] for name in MEASURES})


def _pass_over(bar: tqdm) -> None:
    """Move the bar on by a cell that took no time, and is to tell nothing of the time that others take."""
    if not bar.disable:
        bar.n, bar.initial, bar.last_print_n = bar.n + 1, bar.initial + 1, bar.last_print_n + 1
        bar.refresh()
