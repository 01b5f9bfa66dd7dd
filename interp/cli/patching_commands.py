"""`interp patch` and `interp compare`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from interp.cli.app import app
from interp.cli.options import (
    MODEL,
    DeviceOption,
    DirectionOption,
    DtypeOption,
    ModelOption,
    ProgressOption,
    SeedOption,
    TaskOption,
    load_model_and_task,
    read_axes,
)
from interp.cli.printing import show_largest, show_rows, show_verified, wrote

if TYPE_CHECKING:
    import xarray as xr


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
