"""A TopK SAE on the heads of one layer: what it explains, what the model loses with it, beside PCA of equal rank.

`python benchmarks/sae_training.py [--folder build/saes] [--out benchmarks/results/sae_training.md]`: SmolLM2-135M,
float32, TopK with k = 32 and eight features a dimension, on the attention outputs of layer 15. Text is
`interp.tasks.natural_text`; rows at its end are for evaluation only. Activations are gathered once, into FOLDER/cache,
together with those of the layers that `benchmarks/feature_circuits.py` needs; SAEs are in FOLDER/<site>. It takes the
better part of an hour on two cores, and a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

from machine import describe

import interp
from interp import saes
from interp.tasks import natural_text

FOLDER = Path("build/saes")
SITE = "blocks.15.attn.hook_z"
SITES = {SITE: 2_048_000} | {f"blocks.{layer}.attn.hook_z": 614_400 for layer in (17, 19, 20, 23, 24, 29)}
"""Tokens to train on: the SAE that is measured, and those of layers whose heads matter most for IOI."""
LENGTH, TRAINING_ROWS, EVALUATED_ROWS = 128, 3072, 96
"""Tokens a row of text; rows to train on, in whole shards of a cache; and rows after them to evaluate on."""
SHARD_TOKENS = 2**14


def main() -> None:
    """Gather, train, evaluate, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = interp.load("smollm2-135m")
    rows = natural_text(model, TRAINING_ROWS + EVALUATED_ROWS, LENGTH)
    trained = train(model, SITE, options.folder)
    log = options.folder / SITE / "log.csv"
    table = report(model, trained, rows[:TRAINING_ROWS], rows[TRAINING_ROWS:], log, SITES[SITE])
    print(table, flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(table)


def train(model, site, folder):
    """The SAE of one site: from the folder if it is there, else trained on the cache, which is gathered if need be."""
    started = time.perf_counter()
    cache = saes.cache_activations(
        model,
        list(SITES),
        natural_text(model, TRAINING_ROWS, LENGTH),
        folder / "cache",
        n_tokens=TRAINING_ROWS * LENGTH,
        dtype="bfloat16",
        shard_tokens=SHARD_TOKENS,
    )
    sae = saes.train(
        model,
        site,
        cache,
        n_tokens=SITES[site],
        architecture="topk",
        k=32,
        expansion=8,
        batch_size=2048,
        learning_rate=1e-3,
        normalise=True,
        dead_after_tokens=200_000,
        out=folder / site,
    )
    print(f"{site}: {SITES[site]} tokens, {time.perf_counter() - started:.0f} s", flush=True)
    return sae


def report(model, sae, training, held_out, log, n_tokens):
    """The table of losses and reconstructions, and the curve of the training."""
    measured = {"TopK SAE": sae, **saes.baselines(model, sae, training[:512])}
    columns = {name: saes.evaluate(model, one, held_out, progress=False) for name, one in measured.items()}
    found = columns["TopK SAE"]
    lines = [
        "# A TopK SAE on attention outputs\n",
        f"{describe()}; SmolLM2-135M, float32, {sae.site}: {sae.d_sae} features, k = 32, trained on {n_tokens:,} "
        f"tokens ({n_tokens / training.numel():.1f} times the same {training.numel():,}). Held out: "
        f"{held_out.numel():,} tokens, every position. PCA and random directions: fitted to 65,536 tokens of training, "
        "with as many numbers a token as the SAE has features.\n",
        "## Cross-entropy and KL, nats a token\n",
        "| run | cross-entropy | KL from clean |",
        "|---|---|---|",
    ]
    for run in ("clean", "zero", "mean"):
        lines.append(f"| {run} | {float(found['ce'].sel(run=run)):.4f} | {float(found['kl'].sel(run=run)):.4f} |")
    for name, one in columns.items():
        ce, kl = float(one["ce"].sel(run="spliced")), float(one["kl"].sel(run="spliced"))
        lines.append(f"| {name} spliced | {ce:.4f} | {kl:.4f} |")
    lines += ["\n## Shares recovered and reconstructions\n", "| number | " + " | ".join(columns) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for share in ("ce_recovered", "kl_recovered"):
        for reference in ("zero", "mean"):
            values = [f"{float(one[share].sel(reference=reference)):.3f}" for one in columns.values()]
            lines.append(f"| {share}, of {reference} | " + " | ".join(values) + " |")
    for name in saes.reconstruction.FORMULAS:
        values = [f"{float(one[name]):.4g}" for one in columns.values()]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    lines += ["\n## Curve\n", "Batches of training; losses of activations scaled to a mean norm of √d.\n", *curve(log)]
    return "\n".join(lines) + "\n"


def curve(log):
    """About a dozen rows of the training's log."""
    with log.open() as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name != "site"]
    chosen = rows[:: max(1, len(rows) // 12)]
    if chosen[-1] is not rows[-1]:
        chosen.append(rows[-1])
    return [
        "| " + " | ".join(names) + " |",
        "|---" * len(names) + "|",
        *("| " + " | ".join(f"{float(row[name]):.4g}" for name in names) + " |" for row in chosen),
    ]


if __name__ == "__main__":
    main()
