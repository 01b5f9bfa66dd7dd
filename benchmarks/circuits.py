"""What edge scores cost beside forward and backward passes, and how faithful the circuits of each method are.

`python benchmarks/circuits.py [--out benchmarks/results/circuits.md]`: SmolLM2-135M, float32, 70,651 edges. Cost: edge
scores of 64 IOI prompts beside plain forward and backward passes of the same prompts, and beside EAP as published
(split inputs: every reader gets its own copy of the residual stream, and gradients of all of them are kept), here the
gradient of a mask over all edges. Faithfulness: CPR and CMD at MIB's ten sizes, found on some prompts and tested on
others.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from machine import describe, interleaved_seconds, peak_memory

import interp
from interp.circuits import acdc, attribution_edge_scores, discover, evaluate, node_roc, secant_edge_scores
from interp.circuits.evaluate import measured
from interp.circuits.graph import Graph
from interp.circuits.node_scores import exact_node_scores
from interp.circuits.split_run import Reference, SplitRun
from interp.circuits.writers import HeadOutputs, writer_outputs
from interp.metrics import logit_diff

METHODS = ("eap", "eap-ig", "relp", "secant", "node-relp", "codes", "cdt", "random")
FEW = {"codes": 10, "cdt": 2}
"""Prompts of methods that need few."""


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--test-prompts", type=int, default=16)
    parser.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args()
    model = interp.load("smollm2-135m")
    lines = [
        "# Circuits\n",
        f"{describe()}; SmolLM2-135M, float32, {Graph.of(model).n_edges:,} edges.\n",
        "## Cost of edge scores\n",
        f"IOI, {options.prompts} prompts; median of {options.repeats} interleaved runs. One pass: a plain forward and "
        "backward pass of the prompts. MB: how far the process grew during the first run, after those above it.\n",
        "| run | s | passes | MB |",
        "|---|---|---|---|",
        *cost(model, interp.tasks.ioi(model, n=options.prompts), options.repeats),
    ]
    print("\n".join(lines), flush=True)
    for name in ("ioi", "greater_than"):
        build = interp.tasks.TASKS[name]
        found_on, tested_on = build(model, n=options.prompts, seed=0), build(model, n=options.test_prompts, seed=1)
        head = (
            f"\n## Faithfulness: {name}, found on {options.prompts} prompts (codes 10, cdt 2), "
            f"tested on {options.test_prompts} others\n"
        )
        lines += [head, *faithfulness(model, found_on, tested_on, options.methods.split(","))]
        print("\n".join(lines[-len(options.methods.split(",")) - 4 :]), flush=True)
    lines += ["\n## Discrete codes against the 20 heads of largest exact effect: IOI, 10 prompts\n", *codes(model)]
    lines += ["\n## ACDC\n", *search(model)]
    table = "\n".join(lines) + "\n"
    print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(table)


def cost(model, task, repeats):
    """Rows of the cost table."""
    model.hf.requires_grad_(False)
    embed = model.hf.get_input_embeddings()

    def plain():
        inputs = embed(task.clean).detach().requires_grad_()
        logits = model.hf(inputs_embeds=inputs, use_cache=False, logits_to_keep=1).logits
        return torch.autograd.grad(logit_diff(logits[:, -1], task.answers, task.wrong).sum(), inputs)

    runs = {
        "one pass": plain,
        "eap": partial(attribution_edge_scores, model, task, progress=False),
        "relp": partial(attribution_edge_scores, model, task, rules="relp", progress=False),
        "secant": partial(secant_edge_scores, model, task, progress=False),
        "eap-ig (5 steps)": partial(attribution_edge_scores, model, task, path="inputs", progress=False),
        "eap by split inputs (4 prompts, scaled)": partial(split_inputs, model, task[:4]),
    }
    memory = {}
    for name, run in runs.items():
        with peak_memory() as seen:
            run()
        memory[name] = seen.megabytes
    seconds = interleaved_seconds(runs, repeats)
    seconds["eap by split inputs (4 prompts, scaled)"] *= len(task) / 4
    one = seconds["one pass"]
    return [f"| {name} | {value:.2f} | {value / one:.1f} | {memory[name]:.0f} |" for name, value in seconds.items()]


def split_inputs(model, task):
    """EAP as published: one graph in which every reader has its own input; the gradient of a mask over all edges."""
    graph, heads = Graph.of(model), HeadOutputs(model)
    reference, _ = writer_outputs(model, graph, task.corrupted, heads)
    run = SplitRun(model, graph, task.clean, Reference(reference), heads)
    mask = torch.from_numpy(graph.exists).float()[None].requires_grad_()
    value = logit_diff(run.logits(mask)[0], task.answers, task.wrong).mean()
    return torch.autograd.grad(value, mask)


def faithfulness(model, found_on, tested_on, methods):
    """One row a method."""
    rows = ["| method | s | CPR | CMD | at 0.1 % | 0.5 % | 1 % | 5 % | 20 % |", "|---|---|---|---|---|---|---|---|---|"]
    for method in methods:
        circuit = discover(model, found_on[: FEW.get(method, len(found_on))], method, progress=False)
        curve = evaluate(model, tested_on, circuit, progress=False)
        points = curve["faithfulness"].sel(ranking="magnitude", size=[0.001, 0.005, 0.01, 0.05, 0.2]).values
        rows.append(
            f"| {method} | {circuit.attrs['seconds']:.0f} | {curve.attrs['cpr']:.2f} | {curve.attrs['cmd']:.3f} | "
            + " | ".join(f"{point:.2f}" for point in points)
            + " |"
        )
        print(rows[-1], flush=True)
    return rows


def search(model):
    """ACDC over all edges: how long, how many runs, and what is left."""
    found_on, tested_on = interp.tasks.ioi(model, n=2, seed=0), interp.tasks.ioi(model, n=16, seed=1)
    circuit = acdc(model, found_on, threshold=0.02, metric="logit_diff", progress=False)
    values, _ = measured(model, tested_on, circuit.graph, [circuit.mask])
    return [
        f"2 IOI prompts, threshold 0.02 of the gap: {circuit.attrs['seconds'] / 60:.1f} minutes, "
        f"{circuit.attrs['n_runs']:,} runs for {circuit.graph.n_edges:,} edges; {circuit.n_edges} edges and "
        f"{len(circuit.heads)} heads kept; faithfulness on 16 other prompts "
        f"{float(values['faithfulness'].mean()):.2f}, accuracy {float(values['accuracy'].mean()):.2f}."
    ]


def codes(model):
    """AUC of codes against the 20 heads of largest exact effect."""
    from interp.circuits.codes import code_scores

    task = interp.tasks.ioi(model, n=16)
    exact = exact_node_scores(model, task, progress=False)
    heads = [str(name) for name in exact["node"].values if str(name).startswith("L")]
    best = [heads[index] for index in np.argsort(-abs(exact.sel(node=heads).values))[:20]]
    rows = ["| prompts | score | positions | AUC | s |", "|---|---|---|---|---|"]
    for corruption in ("s2", "abc"):
        few = interp.tasks.ioi(model, n=10, corruption=corruption)
        for score in ("count", "changed"):
            for positions in ("mean", "last"):
                found = code_scores(model, few, score=score, positions=positions, progress=False)
                auc = node_roc(found, best, nodes=heads)["auroc"]
                rows.append(f"| {corruption} | {score} | {positions} | {auc:.3f} | {found.attrs['seconds']:.1f} |")
    return rows


if __name__ == "__main__":
    main()
