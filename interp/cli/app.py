"""The application: its help, and the flags that stand before a command."""

from __future__ import annotations

from typing import Annotated

import typer

from interp.cli.errors import OneLineErrors

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


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere on the line.")] = False,
) -> None:
    """`--debug` is taken off the line by `OneLineErrors.main`; it stands here for the help."""
