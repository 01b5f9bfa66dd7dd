"""The commands. Heavy libraries are imported inside them, so that `interp --help` answers at once."""

from __future__ import annotations

import difflib
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interp.cli.errors import OneLineErrors
from interp.cli.printing import show_frame, show_largest, show_rows, show_verified, wrote

if TYPE_CHECKING:
    import xarray as xr

    from interp.model import Model
    from interp.patching.cells import Axis
    from interp.tasks import Task

MODEL = "smollm2-135m"

app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Look inside transformers: exact interventions on any Hugging Face model, and reports to read.

    Start with a report on which attention heads matter for a behaviour:

        interp report --model smollm2-135m --task ioi --out ioi.html

    Every command takes a model as a hub id ("gpt2"), a folder, a .gguf file, or "smollm2-135m"; and a task by name
    (see `interp tasks`) or as a .jsonl or .csv file of your own prompt pairs.
    """,
)

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Hub id, folder, .gguf file, or smollm2-135m.")]
TaskOption = Annotated[
    str, typer.Option("--task", "-t", help="A task by name, or a .jsonl or .csv file of prompt pairs.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of the task's prompts and of bootstrap intervals.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... The CPU by default.")]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16, float16. By default as stored.")]
DirectionOption = Annotated[str, typer.Option(help="denoise (does it restore?) or noise (does it break?).")]
ProgressOption = Annotated[
    bool | None, typer.Option("--progress/--no-progress", help="Progress bars. By default in a terminal only.")
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere on the line.")] = False,
) -> None:
    """`--debug` is taken off the line by `OneLineErrors.main`; it stands here for the help."""


@app.command()
def report(
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write. It appears when it is whole.")],
    model: ModelOption = MODEL,
    task: TaskOption = "ioi",
    n: Annotated[int, typer.Option(help="Prompt pairs on which the behaviour is measured.")] = 64,
    n_interventions: Annotated[int, typer.Option(help="Prompts for the ablation of every head.")] = 6,
    n_maps: Annotated[int, typer.Option(help="Prompts for layer × position maps, value and pattern patches.")] = 4,
    seed: SeedOption = 0,
    format: Annotated[
        str | None, typer.Option(help="html, csv (a row a head), json or nc. By default what --out ends in.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    progress: ProgressOption = None,
) -> None:
    """Find the attention heads that matter for a behaviour, and write a report.

    Exact interventions, no estimates: about three minutes for SmolLM2-135M on two CPU cores. Fewer prompts take less
    time; the intervals in the report say what that costs.

    **Examples**

        interp report --model smollm2-135m --task ioi --out ioi.html

        interp report --model gpt2 --task greater_than --out years.nc --device cuda

        interp report --task my_pairs.jsonl --n-interventions 4 --n-maps 2 --out quick.html
    """
    from interp.report import heads as write_report
    from interp.report.head_report import check_format
    from interp.report.writing import check_target

    check_target(out)
    chosen = check_format(format or out.suffix.removeprefix("."))
    loaded, prompts = load_model_and_task(model, task, n, seed, device, dtype)
    started = time.perf_counter()
    write_report(
        loaded,
        prompts,
        out,
        format=chosen,
        n_interventions=n_interventions,
        n_maps=n_maps,
        seed=seed,
        command=command_line(),
        progress=progress,
    )
    wrote(out, time.perf_counter() - started)


@app.command()
def patch(
    model: ModelOption = MODEL,
    task: TaskOption = "ioi",
    site: Annotated[
        str, typer.Option(help="What to patch: resid_pre, attn_out, mlp_out, z, q, k, v, pattern ...")
    ] = "resid_pre",
    by: Annotated[
        str, typer.Option(help="Axes to keep, joined by commas; the others are patched together.")
    ] = "layer,position",
    method: Annotated[
        str, typer.Option(help="exact, or an estimate: relp, secant, atp, atp+qk, atp*, ig ... (interp compare).")
    ] = "exact",
    verify: Annotated[
        int | None, typer.Option(help="Run this many of an estimate's largest entries exactly, beside it.")
    ] = None,
    direction: DirectionOption = "denoise",
    ablation: Annotated[str, typer.Option(help="What noising puts in: resample, mean or zero.")] = "resample",
    metric: Annotated[str | None, typer.Option(help="The task's own by default.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="In the metric's units, not as a share of clean − corrupted.")
    ] = False,
    n: Annotated[int, typer.Option(help="Prompt pairs.")] = 4,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A .nc, .csv, .json or .html file; a table here if none.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    progress: ProgressOption = None,
) -> None:
    """Patch an activation everywhere along some axes, and say what each patch does; exactly, or by an estimate.

    **Examples**

        interp patch --site resid_pre --by layer,position --out stream.html

        interp patch --model gpt2 --site z --by layer,head --direction noise --out heads.nc

        interp patch --method relp --verify 50 --n 32 --out stream.html
    """
    from interp.report.effects import check_ending, write_effects
    from interp.report.writing import check_target

    if out is not None:
        check_ending(check_target(out))
    run = patching_method(method, verify, ablation)
    axes = read_axes(by)
    loaded, prompts = load_model_and_task(model, task, n, seed, device, dtype)
    started = time.perf_counter()
    effects = run(
        loaded, prompts, site=site, by=axes, direction=direction, metric=metric, normalised=not raw, progress=progress
    )
    if verify is not None:
        show_verified(effects)
    if out is None:
        show_largest(effects)
    else:
        write_effects(effects, out)
        wrote(out, time.perf_counter() - started)


@app.command()
def compare(
    model: ModelOption = MODEL,
    task: TaskOption = "ioi",
    methods: Annotated[str, typer.Option(help="Estimates, joined by commas.")] = "atp,relp,secant",
    sites: Annotated[str, typer.Option(help="Sites, joined by commas.")] = "resid_pre,attn_out,mlp_out",
    by: Annotated[str, typer.Option(help="Axes to keep, joined by commas.")] = "layer,position",
    direction: DirectionOption = "denoise",
    metric: Annotated[str | None, typer.Option(help="The task's own by default; it needs a gradient.")] = None,
    n: Annotated[int, typer.Option(help="Prompt pairs.")] = 8,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A .html page with every cell, or a .csv of all numbers.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    progress: ProgressOption = None,
) -> None:
    """Hold estimates against exact effects: how well does each method agree, at each site?

    **Examples**

        interp compare --model smollm2-135m --task ioi --n 32 --out agreement.html

        interp compare --methods relp,relp+ah,relp+qk,attnlrp --sites z --by layer,head
    """
    from interp.patching.compare import agreement_by_method
    from interp.patching.compare import compare as compare_methods
    from interp.patching.methods import method_named
    from interp.report.comparison import comparison_page, summary_columns
    from interp.report.writing import check_target, write_text

    if out is not None and check_target(out).suffix not in (".html", ".csv"):
        raise ValueError(f"{str(out)!r} must end in .html or .csv")
    names, axes = [method_named(name.strip()) for name in methods.split(",")], read_axes(by)
    kinds = [name.strip() for name in sites.split(",")]
    loaded, prompts = load_model_and_task(model, task, n, seed, device, dtype)
    started = time.perf_counter()
    compared = compare_methods(
        loaded,
        prompts,
        methods=names,
        sites=kinds,
        by=axes,
        direction=direction,  # type: ignore[arg-type]
        metric=metric,
        progress=progress,
    )
    agreed = agreement_by_method(compared, seed=seed)
    columns = summary_columns(agreed)
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    show_rows(list(columns), rows, title=f"agreement with exact effects ({direction}, n = {len(prompts)} prompts)")
    if out is not None:
        write_text(agreed.to_csv() if out.suffix == ".csv" else comparison_page(compared, agreed), out)
        wrote(out, time.perf_counter() - started)


@app.command()
def heads(
    model: ModelOption = MODEL,
    task: TaskOption = "ioi",
    n: Annotated[int, typer.Option(help="Prompt pairs.")] = 8,
    top: Annotated[int, typer.Option(help="Rows to show, by resample ablation; 0 for all.")] = 20,
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write all rows to this .csv file instead.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    progress: ProgressOption = None,
) -> None:
    """List attention heads with their importance, attention scores and role, one row a head.

    **Examples**

        interp heads --model smollm2-135m --task ioi

        interp heads --model gpt2 --task induction --n 16 --out heads.csv
    """
    from interp.heads import table
    from interp.report.writing import check_target, write_text

    if out is not None and check_target(out).suffix != ".csv":
        raise ValueError(f"{str(out)!r} must end in .csv")
    loaded, prompts = load_model_and_task(model, task, n, seed, device, dtype)
    started = time.perf_counter()
    frame = table(loaded, prompts, seed=seed, progress=progress)
    if out is None:
        order = frame["importance_resample"].abs().sort_values(ascending=False).index
        show_frame(frame.loc[order[: top or None]].reset_index(), f"heads of {loaded.name} on {task}, n = {n} prompts")
    else:
        write_text(frame.to_csv(), out)
        wrote(out, time.perf_counter() - started)


@app.command()
def tasks(
    show: Annotated[
        str | None, typer.Option(help="Show prompts of this task (or file), and the model's accuracy.")
    ] = None,
    model: ModelOption = MODEL,
    n: Annotated[int, typer.Option(help="Prompt pairs to measure accuracy on.")] = 32,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """List the built-in tasks, or show one.

    **Examples**

        interp tasks

        interp tasks --show ioi --model smollm2-135m
    """
    from interp.tasks import TASKS, accuracy

    if show is None:
        show_rows(["task", "what it asks"], [[name, summary_line(build)] for name, build in TASKS.items()])
        return
    loaded, shown = load_model_and_task(model, show, n, seed, device, dtype)
    few = shown[:5]
    answers, wrong = ([loaded.to_str_tokens([one for one in ids.tolist() if one >= 0])[:3] for ids in rows]
                      for rows in (few.answers, few.wrong))  # fmt: skip
    rows = [list(map(str, row)) for row in zip(few.clean_text, few.corrupted_text, answers, wrong, strict=True)]
    show_rows(["clean", "corrupted", "answer", "wrong"], rows, title=f"{shown.name}: {shown.description}")
    found = accuracy(loaded, shown)
    mean, low, high = found["accuracy"].sel(run="clean").values
    typer.echo(
        f"{loaded.name}: accuracy {mean:.2f} [{low:.2f}, {high:.2f}] (chance {found.attrs['chance']:.2f}), "
        f"{shown.metric} {found['metric'].sel(run='clean', statistic='mean'):.2f} clean, "
        f"{found['metric'].sel(run='corrupted', statistic='mean'):.2f} corrupted, n = {len(shown)}"
    )


@app.command()
def models() -> None:
    """List the model families that are known, and the models that can be loaded without a network.

    **Example**

        interp models
    """
    from interp.model.anatomy import FAMILIES
    from interp.model.load import available_offline

    names = available_offline()
    typer.echo(f"offline:  {', '.join(names) or 'none'}; any folder or .gguf file")
    typer.echo(f"families: {', '.join(FAMILIES)}; and others whose parts can be told by their names")


@app.command()
def show(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to run.")],
    site: Annotated[
        str, typer.Option(help="A name, short form or pattern: z, blocks.3.*, blocks.*.hook_mlp_out.")
    ] = "resid_pre",
    model: ModelOption = MODEL,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Show the shape and statistics of activations on a prompt, and what the model says next.

    **Examples**

        interp show --prompt "When Mary and John went to the store, John gave a drink to" --site blocks.3.attn.hook_z

        interp show --model gpt2 --prompt "1 2 3" --site "blocks.0.*"
    """
    loaded = load_model(model, device, dtype)
    logits, cache = loaded.run_with_cache(prompt, site)
    rows = []
    for name, activation in cache.items():
        values = activation.float()
        finite = values[values.isfinite()]  # masked scores are −inf
        numbers = [finite.mean(), finite.std(), finite.min(), finite.max(), values.nan_to_num(0, 0, 0).norm()]
        rows.append([name, str(list(activation.shape)), *(f"{float(number):.4g}" for number in numbers)])
    show_rows(["site", "shape", "mean", "std", "min", "max", "norm"], rows)
    probabilities, ids = logits[0, -1].float().softmax(-1).topk(5)
    said = zip(loaded.to_str_tokens(ids), probabilities.tolist(), strict=True)
    typer.echo("next token: " + ", ".join(f"{token!r} {probability:.2f}" for token, probability in said))


def patching_method(method: str, verify: int | None, ablation: str) -> Callable[..., xr.DataArray]:
    """The function that `--method`, `--verify` and `--ablation` ask for."""
    from interp.patching import METHODS, activation_patching
    from interp.patching.methods import method_named

    if method == "exact":
        if verify is not None:
            raise ValueError("--verify runs an estimate's largest entries exactly; --method exact is exact already")
        return partial(activation_patching, ablation=ablation)  # type: ignore[arg-type]
    if ablation != "resample":
        raise ValueError("--ablation is for --method exact: estimates are of resampling")
    return partial(METHODS[method_named(method)], verify=verify)


def read_axes(text: str) -> list[Axis]:
    """The axes of the `--by` option: "layer,head"."""
    from interp.patching.cells import AXES

    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in AXES]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no axis; there are {', '.join(AXES)}")
    return names  # type: ignore[return-value]


def load_model(source: str, device: str | None, dtype: str | None) -> Model:
    """The model of the `--model` option."""
    import torch

    from interp.model.load import load

    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"{dtype!r} is no type of numbers; there are float32, bfloat16, float16")
    return load(source, device=device, dtype=dtype and getattr(torch, dtype))


def load_model_and_task(
    source: str, task: str, n: int, seed: int, device: str | None, dtype: str | None
) -> tuple[Model, Task]:
    """The model of `--model` and the task of `--task`: by name, or the first n pairs of a file."""
    from interp.tasks import TASKS, read

    # Before the model is loaded, which takes longer.
    is_file = Path(task).suffix in (".jsonl", ".csv")
    if task not in TASKS and not is_file:
        near = difflib.get_close_matches(task, TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TASKS)}, or give a .jsonl or .csv file"
        raise ValueError(f"{task!r} is not a task; {hint}")
    if is_file and not Path(task).is_file():
        raise FileNotFoundError(f"there is no file {task}")
    model = load_model(source, device, dtype)
    return model, read(model, task)[:n] if is_file else TASKS[task](model, n, seed=seed)


def command_line() -> str:
    """The command as it was typed, for the report."""
    return shlex.join(["interp", *(word for word in sys.argv[1:] if word != "--debug")])


def summary_line(build: Any) -> str:
    """The first line of a docstring."""
    return (build.__doc__ or "").strip().partition("\n")[0]
