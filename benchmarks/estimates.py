"""What estimates cost beside plain forward and backward passes, and how well they agree with exact effects.

`python benchmarks/estimates.py [--out benchmarks/results/estimates.md]`: SmolLM2-135M, float32, IOI. Cost: every site
of 64 prompts at once (residual streams, attention and MLP outputs, z, q, k, v, neurons), beside two plain forwards and
one plain backward of the same prompts. Agreement: Pearson, Spearman and top-20 recall with the exact effects.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from machine import describe, interleaved_seconds

import interp
from interp.metrics import logit_diff
from interp.patching import estimates
from interp.patching.agreement import agreement
from interp.patching.compare import agreement_by_method, compare
from interp.tasks.ioi import TEMPLATES

ALL_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "mlp_post")
POSITIONS, HEADS = ("layer", "position"), ("layer", "head")
RUNS = (
    (POSITIONS, ("resid_pre", "attn_out", "mlp_out"), "denoise"),
    (POSITIONS, ("resid_pre", "attn_out", "mlp_out"), "noise"),
    (HEADS, ("z", "q", "k", "v"), "denoise"),
)
HEADER = ("| site | method | cells | Pearson | Spearman | recall 20 |", "|---|---|---|---|---|---|")
METHODS_COMPARED = ("atp", "atp+qk", "relp", "relp+ah", "relp+qk", "attnlrp", "cp-lrp", "secant", "gradxinput")


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--template-prompts", type=int, default=16)
    options = parser.parse_args()
    model = interp.load("smollm2-135m")
    lines = [
        "# Estimates\n",
        f"{describe()}; SmolLM2-135M, float32, IOI (S2 swapped).\n",
        "## Cost\n",
        f"64 prompts, {len(ALL_SITES)} kinds of site in all layers; median of {options.repeats} interleaved runs.\n",
        "| run | s | of two forwards + one backward |",
        "|---|---|---|",
        *cost(model, interp.tasks.ioi(model, n=64), options.repeats),
        "\n## Agreement with exact effects\n",
        f"{options.prompts} prompts, mean map; brackets: 95 % bootstrap intervals over prompts.\n",
    ]
    print("\n".join(lines), flush=True)
    task = interp.tasks.ioi(model, n=options.prompts)
    found = {}
    for by, sites, direction in RUNS:
        found[direction, by] = compare(
            model, task, methods=METHODS_COMPARED, sites=sites, by=by, direction=direction, progress=False
        )
        lines += agreement_tables(found[direction, by], by, direction)
        print("\n".join(lines), flush=True)
    lines += both_directions(*(found[direction, POSITIONS] for direction in ("denoise", "noise")))
    lines += by_template(model, options.template_prompts)
    table = "\n".join(lines) + "\n"
    print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(table)


def cost(model, task, repeats):
    """Rows of the cost table."""

    def metric(logits):
        return logit_diff(logits[:, -1], task.answers, task.wrong).sum()

    embed = model.hf.get_input_embeddings()

    def plain():
        with torch.no_grad():
            model.hf(task.clean, use_cache=False, logits_to_keep=1)
        inputs = embed(task.corrupted).detach().requires_grad_()
        logits = model.hf(inputs_embeds=inputs, use_cache=False, logits_to_keep=1).logits
        return torch.autograd.grad(metric(logits), inputs)

    model.hf.requires_grad_(False)
    runs = {"two plain forwards, one plain backward": plain}
    for name in ("atp", "relp", "secant"):
        runs[name] = partial(
            estimates, model, task, sites=ALL_SITES, method=name, by=("layer",), batch_size=64, progress=False
        )
    seconds = interleaved_seconds(runs, repeats)
    base = seconds["two plain forwards, one plain backward"]
    rows = [f"| {name} | {value:.2f} | {value / base:.2f} |" for name, value in seconds.items()]
    return [*rows, f"\nSecant / RelP: {seconds['secant'] / seconds['relp']:.2f}."]


def agreement_tables(compared, by, direction):
    """One table: a row for each site and method."""
    agreed = agreement_by_method(compared, n_resamples=200)
    lines = [f"\n### {direction}, [{' x '.join(by)}]\n", *HEADER]
    for site, method, cells in product(compared, METHODS_COMPARED, ("all", "without layer 0")):
        lines.append(f"| {site} | {method} | {cells} | {_measures(agreed.loc[method, site, cells])} |")
    return lines


def both_directions(denoise, noise):
    """Secant is symmetric: held against the mean of denoising and noising effects too."""
    lines = ["\n### mean of denoising and noising, [layer x position]\n", *HEADER]
    for site, method in product(denoise, ("atp", "relp", "secant")):
        exact = (denoise[site].sel(estimate="exact", drop=True) + noise[site].sel(estimate="exact", drop=True)) / 2
        scores = denoise[site].sel(estimate=method, drop=True).assign_attrs(unsigned=0)
        lines.append(f"| {site} | {method} | all | {_measures(agreement(scores, exact, n_resamples=200).loc['all'])} |")
    return lines


def by_template(model, n):
    """How far agreement depends on the prompts: the same methods on each of the task's templates."""
    sites, methods = ("resid_pre", "attn_out", "mlp_out"), ("atp", "relp", "secant")
    pearson = {}
    for number in range(len(TEMPLATES)):
        task = interp.tasks.ioi(model, n=n, templates=[number])
        compared = compare(model, task, methods=methods, sites=sites, progress=False)
        table = agreement_by_method(compared, n_resamples=0).xs("all", level="cells")["pearson"]
        pearson[number] = [table[method, site] for site, method in product(sites, methods)]
    columns = [f"{site} {method}" for site, method in product(sites, methods)]
    values = np.array(list(pearson.values()))
    rows = {str(number): row for number, row in pearson.items()} | {"median": np.median(values, axis=0)}
    return [
        f"\n### Pearson by template ({n} prompts each), denoise, [layer x position], all cells\n",
        f"| template | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
        *(f"| {name} | {' | '.join(f'{value:.3f}' for value in row)} |" for name, row in rows.items()),
    ]


def _measures(row):
    return " | ".join(
        f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"
        for name in ("pearson", "spearman", "recall_20")
    )


if __name__ == "__main__":
    main()
