"""Errors of the command line: one line on stderr, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
import typer.core

BAD_INPUT = (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class OneLineErrors(typer.core.TyperGroup):
    """A group of commands that ends with one line on stderr and an exit code where others show a traceback."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line, and exit unless `standalone_mode` is off."""
        given = list(sys.argv[1:] if args is None else args)
        words = [word for word in given if word != "--debug"]
        show_tracebacks = "--debug" in given or not standalone_mode
        try:
            code = super().main(words, prog_name, complete_var, False, windows_expand_args, **extra)
        except Exception as error:
            if show_tracebacks:
                raise
            typer.echo(f"interp: {one_line(error)}", err=True)
            sys.exit(exit_code(error))
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


def one_line(error: Exception) -> str:
    """An error's message on one line; what is long (a module tree) is left for `--debug`."""
    if hasattr(error, "format_message"):  # the parser's own errors: an unknown option, a missing value
        context = getattr(error, "ctx", None)
        advice = f" (see: {context.command_path} --help)" if context is not None else ""
        return f"{error.format_message()}{advice}".replace("\n", " ")
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return f"{type(error).__name__} (--debug shows where)"
    if len(lines) > 4:
        return f"{lines[0]} (--debug shows {len(lines) - 1} more lines)"
    return "; ".join(lines) if isinstance(error, BAD_INPUT) else f"{type(error).__name__}: {'; '.join(lines)}"


def exit_code(error: Exception) -> int:
    """2 for bad input, 1 for a failure."""
    return int(getattr(error, "exit_code", 2 if isinstance(error, BAD_INPUT) else 1))
