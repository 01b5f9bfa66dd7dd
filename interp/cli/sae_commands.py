"""`interp sae ...`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from interp.cli.app import app
from interp.cli.options import MODEL, DeviceOption, DtypeOption, ModelOption, ProgressOption, load_model

sae = typer.Typer(
    name="sae",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Sparse autoencoders on attention outputs and other sites.",
)
app.add_typer(sae)


@sae.command()
def train(
    site: Annotated[
        list[str], typer.Option("--site", "-s", help="Where activations are read; several: one SAE each, in one pass.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder for the SAE, log.csv and the checkpoint to go on from.")
    ],
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")],
    model: ModelOption = MODEL,
    text: Annotated[
        str, typer.Option(help="natural (on every machine), a folder of .txt files, or a data set of the hub.")
    ] = "natural",
    architecture: Annotated[str, typer.Option(help="relu, gated, topk, batch_topk, jumprelu or matryoshka.")] = "topk",
    expansion: Annotated[float, typer.Option(help="Features a dimension of the input.")] = 8,
    d_sae: Annotated[int | None, typer.Option(help="Features, instead of by --expansion.")] = None,
    k: Annotated[int | None, typer.Option(help="Features active in a token (TopK family; 32).")] = None,
    l1: Annotated[float | None, typer.Option(help="Sparsity coefficient (relu, gated).")] = None,
    target: Annotated[str | None, typer.Option(help="Train a transcoder: the site that is predicted.")] = None,
    batch_size: Annotated[int, typer.Option(help="Tokens a step.")] = 4096,
    learning_rate: Annotated[float | None, typer.Option(help="By default 2e-4 * √(16,384 / features).")] = None,
    normalise: Annotated[
        bool, typer.Option("--normalise", help="Scale activations to a mean norm of √d; folded into the result.")
    ] = False,
    dead_after: Annotated[
        int | None,
        typer.Option(help="Tokens without firing after which a feature is dead (10 million, at most a tenth)."),
    ] = None,
    resample_every: Annotated[int | None, typer.Option(help="Steps between resamplings of dead features.")] = None,
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 128,
    from_position: Annotated[
        int, typer.Option(help="First position to train on; 1 leaves out the BOS, or what stands there as a sink.")
    ] = 0,
    buffer_tokens: Annotated[int, typer.Option(help="Activations that are mixed.")] = 2**17,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="The SAE's products in bfloat16.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and mixing.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    progress: ProgressOption = None,
) -> None:
    """Train sparse autoencoders. Killed, the same command goes on from the last checkpoint, five minutes back at most.

    Under torchrun, data-parallel: --batch-size is each process's, and --device cuda the GPU of each.

    **Examples**

        interp sae train --model smollm2-135m --site blocks.15.attn.hook_z --tokens 2000000 --k 32 --out sae/

        interp sae train --model gpt2 -s blocks.5.attn.hook_z -s blocks.8.attn.hook_z --tokens 1000000 -o two/

        torchrun --nproc-per-node 2 --no-python interp sae train -s blocks.5.attn.hook_z --tokens 1000000 -o sae/
    """
    import torch

    from interp.saes.architectures import ARCHITECTURES
    from interp.saes.distributed import device_of_process, is_first_of_torchrun
    from interp.saes.training import train as train_saes

    if architecture not in ARCHITECTURES:
        raise ValueError(f"--architecture {architecture!r}: it is one of {', '.join(ARCHITECTURES)}")
    if tokens < 1:
        raise ValueError(f"--tokens {tokens}: give 1 at least")
    loaded = load_model(model, device_of_process(device), dtype)
    started = time.perf_counter()
    trained = train_saes(
        loaded,
        site,
        text,
        n_tokens=tokens,
        architecture=architecture,
        expansion=expansion,
        d_sae=d_sae,
        k=k,
        l1=l1,
        target=target,
        batch_size=batch_size,
        learning_rate=learning_rate,
        normalise=normalise,
        dead_after_tokens=dead_after,
        resample_every=resample_every,
        length=length,
        positions=slice(from_position, None),
        buffer_tokens=buffer_tokens,
        autocast=torch.bfloat16 if bfloat16 else None,
        seed=seed,
        out=out,
        progress=progress,
    )
    if not is_first_of_torchrun():
        return
    for name, one in trained.items():
        typer.echo(f"{name}: {one.architecture}, {one.d_in} -> {one.d_sae}, {one.metadata['tokens']:,} tokens")
    typer.echo(f"wrote {out} ({time.perf_counter() - started:.0f} s)")
