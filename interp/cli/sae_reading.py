"""`interp sae eval`, `sae show` and `sae convert`: what to do with an SAE that is there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from interp.cli.options import MODEL, DeviceOption, DtypeOption, ModelOption, ProgressOption, load_model
from interp.cli.printing import wrote
from interp.cli.sae_commands import sae

if TYPE_CHECKING:
    from interp.saes import SAE

SAEArgument = Annotated[Path, typer.Argument(help="The SAE: a folder, or a weights file of any format that is read.")]
NTextsOption = Annotated[int, typer.Option(help="Texts to read, of natural text that is on every machine.")]
LengthOption = Annotated[int, typer.Option(help="Tokens a text.")]
SiteOption = Annotated[
    str | None, typer.Option("--site", "-s", help="Where the SAE reads, such as blocks.5.attn.hook_z, if no file says.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of the texts and of what is drawn from them.")]


def _loaded(path: Path, site: str | None) -> SAE:
    from interp.saes import load

    one = load(path)
    one.site = one.site if site is None else site
    if one.site is None:
        raise ValueError(f"{path}: no file says where this SAE reads; give --site, such as blocks.5.attn.hook_z")
    return one


@sae.command("eval")
def evaluate(
    path: SAEArgument,
    model: ModelOption = MODEL,
    n: NTextsOption = 64,
    length: LengthOption = 128,
    site: SiteOption = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines", help="PCA and a random decoder at as many features a token, too; fitted to n other texts."
        ),
    ] = False,
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="All numbers of the SAE, as .nc.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    progress: ProgressOption = None,
) -> None:
    """Splice an SAE into the model: what becomes of the loss, and how good are its reconstructions?

    **Examples**

        interp sae eval sae/ --model smollm2-135m --baselines
    """
    from interp.report.writing import check_target, write_netcdf
    from interp.saes import baselines as baselines_of
    from interp.saes import describe_evaluation
    from interp.saes import evaluate as evaluate_sae
    from interp.tasks import natural_text

    if out is not None and out.suffix != ".nc":
        raise ValueError(f"--out {out}: the numbers are written as .nc")
    target = None if out is None else check_target(out)
    started = time.perf_counter()
    one = _loaded(path, site)
    loaded = load_model(model, device, dtype)
    one = one.to(loaded.device)
    texts = natural_text(loaded, 2 * n if baselines else n, length, seed)
    tokens, others = texts[:n], texts[n:]
    found = evaluate_sae(loaded, one, tokens, progress=progress)
    typer.echo(describe_evaluation(found))
    if baselines:
        for name, baseline in baselines_of(loaded, one, others, seed=seed).items():
            typer.echo(f"\n{name}:\n{describe_evaluation(evaluate_sae(loaded, baseline, tokens, progress=progress))}")
    if target is not None:
        write_netcdf(found, target)
        wrote(target, time.perf_counter() - started)


@sae.command()
def show(
    path: SAEArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML page to write.")],
    model: ModelOption = MODEL,
    feature: Annotated[
        list[int] | None, typer.Option("--feature", "-f", help="Which features; by default ten drawn at random.")
    ] = None,
    n: NTextsOption = 256,
    length: LengthOption = 128,
    site: SiteOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    progress: ProgressOption = None,
) -> None:
    """Write a page on features of an SAE: contexts, logit weights, heads, sources.

    **Examples**

        interp sae show sae/ --model smollm2-135m -f 12 -f 407 --out features.html
    """
    from interp.report import dashboard
    from interp.tasks import natural_text

    started = time.perf_counter()
    one = _loaded(path, site)
    loaded = load_model(model, device, dtype)
    one = one.to(loaded.device)
    tokens = natural_text(loaded, n, length, seed)
    dashboard(loaded, one, tokens, feature or None, out, seed=seed, progress=progress)
    wrote(out, time.perf_counter() - started)


@sae.command()
def convert(
    path: SAEArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    format: Annotated[
        str, typer.Option(help="saelens, dictionary_learning, sparsify or gemma_scope; what is read is recognised.")
    ] = "saelens",
) -> None:
    """Rewrite an SAE in another library's format, with the same features and reconstructions.

    **Examples**

        interp sae convert downloaded/ --format sparsify --out mine/
    """
    from interp.saes import convert as convert_sae
    from interp.saes import load

    convert_sae(path, out, format)  # type: ignore[arg-type]
    read = load(out, format)  # type: ignore[arg-type]
    where = "the format has no place for the site" if read.site is None else read.site
    typer.echo(f"wrote {out}: {format}, {read.architecture}, {read.d_in} -> {read.d_sae}, {where}")
