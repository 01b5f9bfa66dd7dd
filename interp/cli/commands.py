"""`interp report`, `heads`, `tasks`, `models` and `show`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from interp.cli.app import app
from interp.cli.options import (
    MODEL,
    DeviceOption,
    DtypeOption,
    ModelOption,
    ProgressOption,
    SeedOption,
    TaskOption,
    command_line,
    load_model,
    load_model_and_task,
    summary_line,
)
from interp.cli.printing import show_frame, show_rows, wrote


@app.command()
def report(
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write. It appears when it is whole.")],
    model: ModelOption = MODEL,
    task: TaskOption = "ioi",
    n: Annotated[int, typer.Option(help="Prompt pairs on which the behaviour is measured.")] = 64,
    n_interventions: Annotated[int, typer.Option(help="Prompts for the ablation of every head.")] = 6,
    n_maps: Annotated[int, typer.Option(help="Prompts for layer × position maps, value and pattern patches.")] = 4,
    seed: SeedOption = 0,
    circuit: Annotated[
        str | None, typer.Option(help="Find and show a circuit: a method (interp circuits methods), or a .json file.")
    ] = None,
    sinks: Annotated[bool, typer.Option("--sinks", help="Look at attention sinks too (half a minute).")] = False,
    sae: Annotated[
        Path | None, typer.Option(help="Look at the features of this SAE too, a folder or weights file (a minute).")
    ] = None,
    feature: Annotated[
        list[int] | None,
        typer.Option("--feature", "-f", help="Of --sae: show this one in full; by default those that matter most."),
    ] = None,
    n_features: Annotated[int, typer.Option(help="Of --sae: how many to show in full, if none are named.")] = 4,
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

        interp report --model smollm2-135m --task ioi --circuit eap-ig --out ioi.html

        interp report --model smollm2-135m --task ioi --sinks --out ioi.html

        interp report --model smollm2-135m --task ioi --sae sae/ --n-features 6 --out ioi.html

        interp report --model gpt2 --task greater_than --out years.nc --device cuda

        interp report --task my_pairs.jsonl --n-interventions 4 --n-maps 2 --out quick.html
    """
    from interp.report import heads as write_report
    from interp.report.circuit_section import check_circuit
    from interp.report.head_report import check_format
    from interp.report.writing import check_target
    from interp.saes import load

    check_target(out)
    chosen = check_format(format or out.suffix.removeprefix("."))
    if circuit is not None:
        check_circuit(circuit)
    if feature and sae is None:
        raise ValueError("--feature is of an SAE: give its folder with --sae")
    found = None if sae is None else load(sae)
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
        circuit=circuit,
        sinks=sinks,
        sae=None if found is None else found.to(loaded.device),
        features=feature or None,
        n_features=n_features,
        command=command_line(),
        progress=progress,
    )
    wrote(out, time.perf_counter() - started)


@app.command()
def heads(
    model: ModelOption = MODEL,
    task: TaskOption = "ioi",
    n: Annotated[int, typer.Option(help="Prompt pairs.")] = 8,
    top: Annotated[int, typer.Option(help="Rows to show, by resample ablation or divergence; 0 for all.")] = 20,
    seed: SeedOption = 0,
    divergence: Annotated[
        bool, typer.Option("--divergence", help="Instead: how far outputs move when a segment of a prompt is removed.")
    ] = False,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="A prompt, for --divergence.")] = None,
    segment: Annotated[str | None, typer.Option(help="What to remove from it; it must occur once.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Many, instead: a .jsonl or .csv file with fields prompt and segment.")
    ] = None,
    distance: Annotated[str, typer.Option(help="Of --divergence: l2, cosine, relative or whitened.")] = "l2",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write all rows to this .csv file instead.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    progress: ProgressOption = None,
) -> None:
    """List attention heads with their importance, attention scores and role, one row a head.

    **Examples**

        interp heads --model smollm2-135m --task ioi

        interp heads --model gpt2 --task induction --n 16 --out heads.csv

        interp heads --divergence --prompt "Anna lives in Rome. Anna's city is" --segment "Anna lives in Rome. "

        interp heads --divergence --prompts contexts.jsonl --distance relative --out divergence.csv
    """
    from interp.cli.divergence_command import read_pairs, show_divergence
    from interp.heads import table
    from interp.report.writing import check_target, write_text

    if divergence:
        pairs = read_pairs(prompt, segment, prompts)
        show_divergence(model, pairs=pairs, distance=distance, top=top, out=out, device=device, dtype=dtype)
        return
    if (prompt, segment, prompts) != (None, None, None):
        raise ValueError("--prompt, --segment and --prompts are for --divergence: add it")
    if out is not None and check_target(out).suffix != ".csv":
        raise ValueError(f"{str(out)!r} must end in .csv")
    loaded, pairs_of_task = load_model_and_task(model, task, n, seed, device, dtype)
    started = time.perf_counter()
    frame = table(loaded, pairs_of_task, seed=seed, progress=progress)
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
