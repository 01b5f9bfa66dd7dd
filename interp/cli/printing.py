"""What commands print: tables on stdout, and what was written where."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


def wrote(path: Path, seconds: float) -> None:
    """Say what was written."""
    size = path.stat().st_size
    shown = f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.0f} kB"
    typer.echo(f"wrote {path} ({shown}, {seconds:.0f} s)")


def show_largest(effects: xr.DataArray) -> None:
    """The largest effects as a table."""
    from interp.report.effects import largest_effects

    unit = "share of the gap" if effects.attrs["normalised"] else effects.attrs["metric"]
    what = "effects" if effects.attrs["method"] == "activation_patching" else f"{effects.attrs['method']} scores"
    title = "{direction} {site}: largest {what} ({unit}), n = {n_prompts} prompts".format(
        what=what, unit=unit, **effects.attrs
    )
    show_frame(largest_effects(effects, 20), title)


def show_verified(effects: xr.DataArray) -> None:
    """What running an estimate's largest entries exactly said of it."""
    attrs = effects.attrs
    typer.echo(
        f"the {attrs['verify_k']} largest scores against exact effects: Pearson {attrs['verify_pearson']:.3f}, "
        f"Spearman {attrs['verify_spearman']:.3f}, right sign {attrs['verify_sign_agreement']:.0%}, largest error "
        f"{attrs['verify_largest_error']:.3f} ({attrs['verify_seconds']:.1f} s)"
    )


def show_frame(frame: pd.DataFrame, title: str) -> None:
    """A DataFrame as a table, numbers with three decimals."""
    cells = [
        [f"{one:.3f}" if isinstance(one, float) else str(one) for one in row] for row in frame.itertuples(index=False)
    ]
    show_rows([str(name) for name in frame.columns], cells, title=title)


def show_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """A table on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Text, because a token such as "[/b]" would be read as rich's markup.
    table = Table(header_style="bold")
    for name in columns:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    if not console.is_terminal:
        # Piped output is cut at 80 columns otherwise.
        console = Console(
            width=max(80, sum(max(map(len, column)) + 3 for column in zip(columns, *rows, strict=True)) + 1)
        )
    if title is not None:
        console.print(Text(title), soft_wrap=True)
    console.print(table)
