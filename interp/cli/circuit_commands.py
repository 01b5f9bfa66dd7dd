"""`interp discover`, `interp evaluate`, and `interp circuits ...`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from interp.cli.app import app
from interp.cli.circuit_printing import said_of, show_circuit, show_curve, show_overlap, show_summary
from interp.cli.options import (
    MODEL,
    DeviceOption,
    DtypeOption,
    ModelOption,
    ProgressOption,
    TaskOption,
    load_model_and_task,
)
from interp.cli.printing import show_rows, wrote

AblationOption = Annotated[
    str, typer.Option(help="What edges outside the circuit carry: resample (the corrupted run), mean or zero.")
]
MetricOption = Annotated[str | None, typer.Option(help="The task's own by default.")]

circuits = typer.Typer(
    name="circuits",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Compare circuits, list the methods that find them, and run many as one job.",
)
app.add_typer(circuits)


@app.command()
def discover(
    model: ModelOption = MODEL,
    task: TaskOption = "ioi",
    method: Annotated[str, typer.Option(help="How to find it: see interp circuits methods.")] = "relp",
    edges: Annotated[
        int | None,
        typer.Option(help="Edges to keep, before dead ends are dropped. 200, or a tenth of a small graph's."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="For methods that score nodes: how many to keep.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Keep edges of this score or more; how acdc chooses (0.01 by default).")
    ] = None,
    selection: Annotated[str, typer.Option(help="top: the best edges; greedy: grown from the logits.")] = "top",
    signed: Annotated[bool, typer.Option("--signed", help="Rank by signed scores instead of magnitudes.")] = False,
    direction: Annotated[str, typer.Option(help="noise (does it break?) or denoise (does it restore?).")] = "noise",
    metric: MetricOption = None,
    positions: Annotated[
        bool,
        typer.Option("--positions", help="Tell positions apart: keep an edge at some of them only. Edge methods only."),
    ] = False,
    n: Annotated[int, typer.Option(help="Prompt pairs.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the prompts, and of methods that draw numbers.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A .json, .graphml, .dot or .html file, or a folder for all four."),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    progress: ProgressOption = None,
) -> None:
    """Find the circuit of a behaviour: the edges between heads and MLPs that carry it.

    **Examples**

        interp discover --model smollm2-135m --task ioi --method eap-ig --edges 200 --out run/

        interp discover --model gpt2 --task greater_than --method codes --nodes 20 --n 10

        interp discover --task my_pairs.jsonl --method acdc --threshold 0.02 --out circuit.json
    """
    from interp.circuits import discover as find
    from interp.circuits.acdc import KL
    from interp.circuits.discover import check_choices
    from interp.report.circuit_files import check_circuit_target, write_circuit

    if out is not None:
        check_circuit_target(out)
    check_choices(method, edges=edges, nodes=nodes, threshold=threshold, selection=selection, positions=positions)
    check_among("--selection", selection, ("top", "greedy"))
    check_among("--direction", direction, ("noise", "denoise"))
    if metric != KL:  # which acdc knows beside the metrics of tasks
        check_metric(metric)
    loaded, prompts = load_model_and_task(model, task, n, seed, device, dtype)
    started = time.perf_counter()
    circuit = find(
        loaded,
        prompts,
        method,
        edges=edges,
        nodes=nodes,
        threshold=threshold,
        selection=selection,  # type: ignore[arg-type]
        signed=signed,
        direction=direction,  # type: ignore[arg-type]
        metric=metric,
        positions=positions,
        seed=seed,
        progress=progress,
    )
    typer.echo(said_of(circuit))
    if out is None:
        show_circuit(circuit)
        return
    for path in write_circuit(circuit, out):
        wrote(path, time.perf_counter() - started)


@app.command()
def evaluate(
    circuit: Annotated[Path, typer.Option("--circuit", "-c", help="The .json file of a circuit.")],
    model: ModelOption = MODEL,
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="As elsewhere; by default the task that it was found on.")
    ] = None,
    n: Annotated[int, typer.Option(help="Prompt pairs.")] = 64,
    seed: Annotated[
        int, typer.Option(help="Seed of the prompts; another than discover's default, so that prompts are others.")
    ] = 1,
    ablation: AblationOption = "resample",
    metric: MetricOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the curve to this .csv, .json or .nc file.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    progress: ProgressOption = None,
) -> None:
    """Test a circuit: how much of the behaviour is left when every edge outside it is cut?

    Tests the circuit itself, and the best edges by its scores at the ten sizes of the MIB benchmark.

    **Examples**

        interp evaluate --circuit run/circuit.json --model smollm2-135m

        interp evaluate --circuit run/circuit.json --task greater_than --ablation mean --out curve.csv
    """
    from interp.circuits import Graph
    from interp.circuits import evaluate as evaluate_circuit
    from interp.circuits.evaluate import ABLATIONS
    from interp.circuits.storage import load
    from interp.report.circuit_files import check_curve_target, write_curve

    if out is not None:
        check_curve_target(out)
    check_among("--ablation", ablation, ABLATIONS)
    check_metric(metric)
    found = load(circuit)
    asked = task or str(found.attrs.get("task", ""))
    if not asked:
        raise ValueError(f"{circuit} does not say which task it was found on: give --task")
    loaded, prompts = load_model_and_task(model, asked, n, seed, device, dtype)
    graph = Graph.of(loaded, neurons=found.graph.neurons)
    if found.graph != graph:
        raise ValueError(f"{circuit}: a circuit of {found.graph}; {loaded.name} has {graph}")
    started = time.perf_counter()
    curve = evaluate_circuit(
        loaded,
        prompts,
        found,
        ablation=ablation,  # type: ignore[arg-type]
        metric=metric,
        progress=progress,
    )
    typer.echo(said_of(found))
    show_curve(curve)
    if out is not None:
        wrote(write_curve(curve, out), time.perf_counter() - started)


@circuits.command()
def methods() -> None:
    """List the methods that find circuits.

    **Example**

        interp circuits methods
    """
    from interp.circuits import METHODS

    rows = [[name, one.level, one.summary, one.cost] for name, one in METHODS.items()]
    show_rows(["method", "scores", "what it does", "cost"], rows)


@circuits.command()
def compare(
    files: Annotated[list[Path], typer.Argument(help="Two or more .json files of circuits of one model.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write all measures of all pairs to this .csv, .json or .nc file."),
    ] = None,
) -> None:
    """What circuits have in common: nodes and edges, against what chance would give.

    **Examples**

        interp circuits compare ioi.json greater_than.json

        interp circuits compare run/gpt2/*/eap-ig/circuit.json --out overlap.csv
    """
    from interp.circuits.reuse import overlap
    from interp.circuits.storage import load
    from interp.report.circuit_files import check_curve_target, write_curve

    if out is not None:
        check_curve_target(out)
    if len(files) < 2:
        raise ValueError(f"{len(files)} file: give two or more to compare")
    started = time.perf_counter()
    loaded = dict(zip(distinct_names(files), map(load, files), strict=True))
    found = overlap(loaded)
    show_overlap(found)
    shared = [head for head in next(iter(loaded.values())).heads if all(head in one.heads for one in loaded.values())]
    typer.echo(f"heads in all of them: {', '.join(shared) or 'none'}")
    if out is not None:
        wrote(write_curve(found, out), time.perf_counter() - started)


@circuits.command(name="run")
def run_sweep(
    sweep: Annotated[Path, typer.Argument(help="A .toml file: models, tasks, methods, and choices.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to.")],
    progress: ProgressOption = None,
) -> None:
    """Find and test many circuits (models × tasks × methods) as one job.

    Killed at any point, the same command goes on where it was. Writes a folder a cell, and summary.csv. The sweep file
    needs three lines:

        models = ["smollm2-135m"]

        tasks = ["ioi", "greater_than"]

        methods = ["eap-ig", "relp"]

    and may set n, n_evaluation, seed, edges, threshold, selection, signed, sizes, direction, metric, ablation,
    batch_size, device and dtype.

    **Example**

        interp circuits run sweep.toml --out circuits/
    """
    from interp.circuits.job import SUMMARY, run_job

    started = time.perf_counter()
    rows = run_job(sweep, out, progress=progress)
    failed, computed = rows[rows["error"] != ""], int(rows["seconds"].notna().sum())
    show_summary(rows)
    for one in failed.itertuples():
        typer.echo(f"failed: {one.model} {one.task} {one.method}: {one.error}")
    typer.echo(f"{len(rows)} cells: {computed} computed, {len(rows) - computed - len(failed)} there already")
    wrote(out / SUMMARY, time.perf_counter() - started)
    if len(failed):
        typer.echo(f"interp: {len(failed)} of {len(rows)} cells failed: see {out / SUMMARY}", err=True)
        raise typer.Exit(1)


def check_among(option: str, value: str, among: Sequence[str]) -> None:
    """Refuse what an option does not know, before a model is loaded.

    Raises:
        ValueError: naming what there is.
    """
    if value not in among:
        raise ValueError(f"{option} {value!r}: it is one of {', '.join(among)}")


def check_metric(name: str | None) -> None:
    """Refuse a metric that there is not, before a model is loaded.

    Raises:
        ValueError: if there is none of this name.
    """
    from interp.metrics import metric_named

    if name is not None:
        metric_named(name)


def distinct_names(files: Sequence[Path]) -> list[str]:
    """What tells the paths of files apart: their folders and names, without what all have in common.

    Raises:
        ValueError: if one file is named twice.
    """
    parts = [list(Path(os.path.abspath(path)).with_suffix("").parts) for path in files]
    if len(set(map(tuple, parts))) < len(parts):
        raise ValueError("one file is named twice: there is nothing to compare")
    for end in (0, -1):
        while min(map(len, parts)) > 1 and len({one[end] for one in parts}) == 1:
            for one in parts:
                del one[end]
    return ["/".join(one) for one in parts]
