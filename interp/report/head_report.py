"""`heads`: the report on which heads matter for a behaviour, as a page to read or as numbers to work with."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import pandas as pd
import xarray as xr

from interp.model import Model
from interp.report.circuit_section import check_circuit
from interp.report.figures import head_label
from interp.report.page import page, paragraph, summary
from interp.report.sections import sections
from interp.report.study import head_study
from interp.report.summary import summary_sentences
from interp.report.writing import check_target, write_json, write_netcdf, write_text
from interp.saes import SAE, load
from interp.tasks import Task

Format = Literal["html", "csv", "json", "nc"]


def heads(
    model: Model,
    task: Task,
    path: str | Path,
    *,
    format: Format | None = None,
    n_interventions: int = 6,
    n_maps: int = 4,
    seed: int = 0,
    circuit: str | None = None,
    sinks: bool = False,
    sae: SAE | str | Path | None = None,
    features: int | Sequence[int] | None = None,
    n_features: int = 4,
    command: str | None = None,
    progress: bool | None = None,
) -> Path:
    """Find out by exact interventions which attention heads matter for a behaviour, and write a report.

    A call that is interrupted leaves its finished parts in a folder beside `path`; the same call goes on from there.

    Cost: see `interp.report.head_study`; about three minutes for SmolLM2-135M on two CPU cores.

    Args:
        model: the model.
        task: the behaviour.
        path: the file to write; it appears when it is whole, and replaces an older one.
        format: "html" a page to read, self-contained; "csv" a table with one row a head; "json" and "nc" (netCDF) all
            numbers, read back by `interp.report.read`. By default what the path ends in.
        n_interventions: prompts for the ablation of every head.
        n_maps: prompts for the layer × position maps, and for value and pattern patches.
        seed: of bootstrap intervals and of the random tokens that attention is scored on.
        circuit: show a circuit too: a method of `interp.circuits.METHODS`, or a file of `interp.circuits.save`.
        sinks: look at attention sinks too, on natural text and on the task's prompts; for SmolLM2-135M about half a
            minute more.
        sae: show features of a sparse autoencoder too: an SAE, or what `interp.saes.load` reads, which is put on the
            model's device; for SmolLM2-135M about a minute more.
        features: which of them to show in full; None: those of largest effect on the task.
        n_features: how many, if none are named.
        command: how the report was asked for, shown in it; the call of this function by default.
        progress: show progress bars; None: in a terminal or notebook only.

    Returns:
        The path.

    Raises:
        ValueError: for an unknown format, a task of fewer than two prompts, or an SAE that cannot be read or is not of
            this model.
        FileNotFoundError: if the folder does not exist. Both before anything is computed.
    """
    path = check_target(path)
    chosen = check_format(format or path.suffix.removeprefix(".") or "html")
    called = f"interp.report.heads(model, {task.name}, {path.name!r}, seed={seed})"
    parts = path.with_name(f".{path.name}.parts")
    study = head_study(
        model,
        task,
        n_interventions=n_interventions,
        n_maps=n_maps,
        seed=seed,
        circuit=check_circuit(circuit) if circuit is not None else None,
        sinks=sinks,
        sae=load(sae).to(model.device) if isinstance(sae, str | Path) else sae,
        features=features,
        n_features=n_features,
        command=command or called,
        keep_parts=parts,
        progress=progress,
    )
    write_study(study, path, format=chosen)
    if parts.is_dir():
        shutil.rmtree(parts)
    return path


def check_format(name: str) -> Format:
    """The format of this name.

    Raises:
        ValueError: if there is none.
    """
    if name not in get_args(Format):
        raise ValueError(f"{name!r} is no format of a report; there are {', '.join(get_args(Format))}")
    return name  # type: ignore[return-value]


def write_study(study: xr.Dataset, path: str | Path, *, format: Format) -> Path:
    """Write a study, computed now or read back, in any format.

    Raises:
        FileNotFoundError: if the folder does not exist.
    """
    if format == "nc":
        return write_netcdf(study, path)
    if format == "json":
        return write_json(study, path)
    if format == "csv":
        return write_text(head_table(study).to_csv(), path)
    return write_text(html_page(study), path)


def html_page(study: xr.Dataset) -> str:
    """The page of a study."""
    title = f"Which heads of {study.attrs['model']} matter for {str(study.attrs['task']).replace('_', ' ')}"
    made = f"{study.attrs['architecture']}; {study.sizes['prompt']} prompt pairs; {study.attrs['date']}"
    return page(title, [paragraph(made, kind="soft"), summary(summary_sentences(study))], sections(study))


def head_table(study: xr.Dataset) -> pd.DataFrame:
    """One row a head, L0H0 first: every measure of the study that has a value for each head."""
    by_head = study[[name for name in study.data_vars if study[name].dims == ("layer", "head")]]
    frame = by_head.to_dataframe().reset_index()
    frame.insert(0, "name", [head_label(*place) for place in zip(frame["layer"], frame["head"], strict=True)])
    # Written as float64, a float32 keeps its value when it is read back; written as it is, it may not.
    narrow = frame.select_dtypes("float32").columns
    return frame.astype(dict.fromkeys(narrow, "float64")).set_index("name")
