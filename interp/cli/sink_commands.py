"""`interp sinks`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from interp.cli.app import app
from interp.cli.options import (
    MODEL,
    DeviceOption,
    DtypeOption,
    ModelOption,
    ProgressOption,
    command_line,
    load_model,
)
from interp.cli.printing import show_rows, wrote

if TYPE_CHECKING:
    import xarray as xr

DORMANT_SHOWN = 20


@app.command()
def sinks(
    model: ModelOption = MODEL,
    text: Annotated[
        Path | None,
        typer.Option(help="A file of text to measure on; by default natural text that is on every machine."),
    ] = None,
    n: Annotated[int, typer.Option(help="Texts; sink dimensions want 50 or more.")] = 50,
    length: Annotated[int, typer.Option(help="Tokens a text.")] = 64,
    epsilon: Annotated[
        float, typer.Option(help="A token is a sink of a head if it receives more than this share of its attention.")
    ] = 0.3,
    seed: Annotated[int, typer.Option(help="Which passages of natural text, and of what is drawn at random.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A .html page with pictures, or all numbers as .nc or .json.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    progress: ProgressOption = None,
) -> None:
    """Find a model's attention sinks: its sink dimensions, where they live, which heads rest there.

    Nothing is assumed of the model: dimensions, layers and tokens are found by what it does on running text.

    **Examples**

        interp sinks --model smollm2-135m

        interp sinks --model gpt2 --text book.txt --n 100 --length 128 --out sinks.html
    """
    from interp.report.sink_files import check_sink_target, sink_numbers, write_sinks
    from interp.report.sink_study import NATURAL_TEXT, texts_of
    from interp.tasks.corpus import natural_text

    if out is not None:
        check_sink_target(out)
    for option, value, least in (("--n", n, 1), ("--length", length, 2)):
        if value < least:
            raise ValueError(f"{option} {value}: give at least {least}")
    if not 0 < epsilon < 1:
        raise ValueError(f"--epsilon {epsilon:g} is no share of attention; it lies between 0 and 1")
    words = None if text is None else text.read_text(encoding="utf-8")
    loaded = load_model(model, device, dtype)
    texts = natural_text(loaded, n, length, seed) if words is None else texts_of(loaded, words, n, length)
    source = NATURAL_TEXT if text is None else text.name
    started = time.perf_counter()
    found = sink_numbers(
        loaded, texts, source=source, epsilon=epsilon, seed=seed, command=command_line(), progress=progress
    )
    show_sinks(found)
    if out is not None:
        wrote(write_sinks(found, out), time.perf_counter() - started)


def show_sinks(found: xr.Dataset) -> None:
    """Sink dimensions, their lives, rates by layer, and dormant heads."""
    from interp.report.sink_section import dimensions_sentence, dormant_sentence, dormant_table, lives_table

    about = found["sink_dimensions"].attrs
    typer.echo(f"{found.attrs['model']}, {about['n_texts']} texts of {about['length']} tokens: {about['source']}")
    typer.echo(dimensions_sentence(found))
    if found.sizes["sink_span"]:
        show_columns(lives_table(found), "massive dimensions")
    if "sink_perplexity" in found:
        values = found["sink_perplexity"]
        said = ", ".join(
            f"{name} {value:,.1f}" for name, value in zip(values["intervention"].values, values.values, strict=True)
        )
        typer.echo(f"perplexity with them overwritten after block {values.attrs['layer']}: {said}")
    if "unreadable" in about:
        typer.echo(f"attention cannot be read: {about['unreadable']}")
        return
    show_columns(rate_table(found), f"the first token as a sink (ε = {about['epsilon']:g}), by layer")
    typer.echo(f"Sink₁: {float(found['sink_rate'].mean()):.1f}% of heads and texts")
    typer.echo(dormant_sentence(found))
    dormant = {name: cells[:DORMANT_SHOWN] for name, cells in dormant_table(found).items()}
    if dormant["head"]:
        show_columns(dormant, f"dormant heads, up to {DORMANT_SHOWN}")


def rate_table(found: xr.Dataset) -> dict[str, list[str | float | int]]:
    """One row a layer: sink rate of the first token, hidden sinks, value norm, heads that rest and that are dormant."""
    by_head = {
        "sink rate (%)": found["sink_rate_by_layer"],
        "hidden sinks a head": found["sink_hidden"].mean("head"),
        "value norm, sink / others": found["sink_value_norm_ratio"].mean("kv_head"),
        "heads resting on sinks": found["sink_rests"].sum("head"),
        "dormant": found["sink_dormant"].sum("head"),
    }
    return {
        "layer": [str(layer) for layer in range(found.sizes["layer"])],
        **{name: values.values.tolist() for name, values in by_head.items()},
    }


def show_columns(columns: dict[str, list[str | float | int]], title: str) -> None:
    """Columns by title as a table; – where a number is not defined."""
    cells = [
        [("–" if one != one else f"{one:.3f}") if isinstance(one, float) else str(one) for one in row]
        for row in zip(*columns.values(), strict=True)
    ]
    show_rows(list(columns), cells, title=title)
