"""What `interp heads --divergence` does: heads by how much of their output comes from a segment of the prompt."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from interp.cli.circuit_commands import check_among
from interp.cli.options import load_model
from interp.cli.printing import show_frame, wrote

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

FIELDS = ("prompt", "segment")
T_VHD_HEADS = 3


def show_divergence(
    model: str,
    *,
    pairs: list[tuple[str, str]],
    distance: str,
    top: int,
    out: Path | None,
    device: str | None,
    dtype: str | None,
) -> None:
    """Compute head divergence over pairs of (prompt, segment), and print or write one row a head."""
    from typing import get_args

    from interp.heads.divergence import Distance, divergence, t_vhd, without_segment
    from interp.report.writing import check_target, write_text

    if out is not None and check_target(out).suffix != ".csv":
        raise ValueError(f"{str(out)!r} must end in .csv")
    check_among("--distance", distance, get_args(Distance))
    ablated = [without_segment(prompt, segment) for prompt, segment in pairs]
    loaded = load_model(model, device, dtype)
    started = time.perf_counter()
    found = divergence(loaded, [prompt for prompt, _ in pairs], ablated, distance=distance)  # type: ignore[arg-type]
    frame = divergence_table(found)
    owed = float(t_vhd(found, min(T_VHD_HEADS, loaded.n_heads)))
    if out is not None:
        write_text(frame.to_csv(index=False), out)
        wrote(out, time.perf_counter() - started)
        return
    ordered = frame.sort_values("divergence", ascending=False, kind="stable")
    n = len(pairs)
    title = f"heads of {loaded.name} by divergence ({distance}) without the segment, n = {n} prompt{'s' * (n > 1)}"
    show_frame(ordered.iloc[: top or None], title)
    typer.echo(f"T-VHD {owed:.3f}: the sum over layers of the {min(T_VHD_HEADS, loaded.n_heads)} largest")


def divergence_table(found: xr.DataArray) -> pd.DataFrame:
    """One row a head, L0H0 first: divergence, the squared norm without the segment, whether it is an outlier."""
    from interp.heads.divergence import ACTIVATION, outlier_heads
    from interp.report.figures import head_label

    frame = found.to_dataframe("divergence").reset_index()[["layer", "head", "divergence", ACTIVATION]]
    frame.insert(0, "name", [head_label(*place) for place in zip(frame["layer"], frame["head"], strict=True)])
    frame["outlier"] = outlier_heads(found).values.ravel()
    return frame.astype({"divergence": float, ACTIVATION: float})


def read_pairs(prompt: str | None, segment: str | None, prompts: Path | None) -> list[tuple[str, str]]:
    """The prompts and segments of `--prompt`, `--segment` and `--prompts`.

    Raises:
        ValueError: if they do not say what to run; the message names file and line.
    """
    if prompts is not None:
        if prompt is not None or segment is not None:
            raise ValueError("--prompts brings prompts and segments: leave --prompt and --segment out")
        return _read_file(prompts)
    if prompt is None or segment is None:
        raise ValueError("--divergence needs --prompt and --segment, or --prompts with a file of both")
    return [(prompt, segment)]


def _read_file(path: Path) -> list[tuple[str, str]]:
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"{path}: the name must end in .jsonl or .csv")
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            rows = [(number, dict(row)) for number, row in enumerate(csv.DictReader(file), start=2)]
        else:
            rows = [(number, _parsed(path, number, line)) for number, line in enumerate(file, start=1) if line.strip()]
    if not rows:
        raise ValueError(f"{path}: no prompts in it")
    for number, row in rows:
        missing = [name for name in FIELDS if not isinstance(row.get(name), str)]
        if missing:
            raise ValueError(f"{path}, line {number}: there is no text {missing[0]!r}; fields are prompt and segment")
    return [(row["prompt"], row["segment"]) for _, row in rows]


def _parsed(path: Path, number: int, line: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
    return row if isinstance(row, dict) else {}
