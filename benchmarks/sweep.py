"""Patching sweeps against TransformerLens, on one prompt pair of SmolLM2-135M.

`python benchmarks/sweep.py [--out benchmarks/results/sweep.md]`: a residual sweep [30 layers x 14 positions] and a head
sweep [30 x 9 x 14], float32, three ways in one run: `activation_patching`; TransformerLens as its users run it, one
forward pass a cell (`get_act_patch_*`); and the same cells stacked in the batch, 64 a forward pass. The slow ways run a
spread of the cells and are scaled up. Two pairs: one that differs from the first token on, so that nothing can be
skipped, and an ordinary one of IOI. Beside it the rate of the machine's matrix product, taken between the runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from machine import describe, matmul_gflops, peak_memory

import interp
from interp.patching import activation_patching
from interp.tasks import from_pairs

PAIRS = {
    "differs from the first token on": (
        "When Mary and John went to the store, John gave a drink to",
        "After Anna or Bill came from a school. Mary took the gift of",
    ),
    "ordinary IOI pair": (
        "When Mary and John went to the store, John gave a drink to",
        "When Mary and John went to the store, Mary gave a drink to",
    ),
}
SWEEPS = {
    "residual stream [30 x 14]": ("resid_pre", ("layer", "position")),
    "heads [30 x 9 x 14]": ("z", ("layer", "position", "head")),
}
CELLS_TIMED = 27
BATCH = 64


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model = interp.load("smollm2-135m")
    bridge = make_bridge(model)
    lines = [
        "# Patching sweeps\n",
        f"{describe()}; SmolLM2-135M, float32, one pair of 14 tokens; medians of {options.repeats} runs of interp "
        "and 3 of TransformerLens, interleaved. TransformerLens one by one: a forward pass a cell with the hook that "
        f"`get_act_patch_*` sets, {CELLS_TIMED} cells spread over the sweep, scaled to all; stacked: {BATCH} cells a "
        "forward pass, one pass, scaled. Rate: arithmetic that the engine runs, over its whole time; the limit is a "
        "plain float32 product of 1024 x 576 x 1536, measured between the runs. Memory: peak above the loaded model.\n",
        "| pair | sweep | cells | interp s | TransformerLens s | ratio | stacked s | ratio | GFLOP/s | of limit | MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for pair, (clean, corrupted) in PAIRS.items():
        task = from_pairs(model, [{"clean": clean, "corrupted": corrupted, "answer": " Mary", "wrong": " John"}])
        assert task.clean.shape[1] == 14, task.clean.shape
        for name, (site, by) in SWEEPS.items():
            lines.append(f"| {pair} | {name} | " + measured(model, bridge, task, site, by, options.repeats))
            print(lines[-1], flush=True)
    table = "\n".join(lines) + "\n"
    print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(table)


def make_bridge(model):
    """TransformerLens's view of the same weights; it alters the model it is given, so it gets a copy."""
    import copy

    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        "smollm2", hf_model=copy.deepcopy(model.hf), tokenizer=model.tokenizer, device="cpu"
    )


def measured(model, bridge, task, site, by, repeats):
    """One row of the table, after its first cells."""
    shape = (30, 14) if site == "resid_pre" else (30, 14, 9)
    n_cells = int(torch.tensor(shape).prod())
    cells = torch.linspace(0, n_cells - 1, CELLS_TIMED).long()
    some = torch.linspace(0, n_cells - 1, BATCH).long()
    clean = cached(bridge, task.clean, site)
    seconds = {"interp": [], "one by one": [], "stacked": [], "limit": []}
    effects, peak = None, 0.0
    for repeat in range(repeats):
        with peak_memory() as memory:
            start = time.perf_counter()
            effects = activation_patching(model, task, site=site, by=by, normalised=False, progress=False)
            seconds["interp"].append(time.perf_counter() - start)
        peak = max(peak, memory.megabytes)
        seconds["limit"].append(matmul_gflops())
        if repeat < 3:
            start = time.perf_counter()
            values = torch.cat(
                [patched(bridge, task, site, clean, cells[one : one + 1], shape) for one in range(len(cells))]
            )
            seconds["one by one"].append((time.perf_counter() - start) / len(cells) * n_cells)
            start = time.perf_counter()
            patched(bridge, task, site, clean, some, shape)
            seconds["stacked"].append((time.perf_counter() - start) / len(some) * n_cells)
    base = logit_diff(bridge(task.corrupted)[:, -1], task)
    found = torch.tensor(effects.values).flatten()[cells]
    assert torch.allclose(found, values - base, atol=2e-3), (found - values + base).abs().max()
    ours, slow, stacked, limit = (statistics.median(one) for one in seconds.values())
    rate = flops(model, task, site) / ours / 1e9
    return (
        f"{n_cells} | {ours:.2f} | {slow:.1f} | **{slow / ours:.1f}x** | {stacked:.1f} | **{stacked / ours:.1f}x** | "
        f"{rate:.0f} | {rate / limit:.0%} of {limit:.0f} | {peak:.0f} |"
    )


@torch.no_grad()
def cached(bridge, tokens, site):
    """Activations of the site by layer, from TransformerLens."""
    suffix = {"resid_pre": "hook_resid_pre", "z": "attn.hook_z"}[site]
    _, cache = bridge.run_with_cache(tokens, names_filter=lambda name: name.endswith(suffix))
    return [cache[f"blocks.{layer}.{suffix}"] for layer in range(30)]


@torch.no_grad()
def patched(bridge, task, site, clean, cells, shape):
    """Metric with one cell patched, for each of some cells: one row of the batch each, as `get_act_patch_*` patches."""
    suffix = {"resid_pre": "hook_resid_pre", "z": "attn.hook_z"}[site]
    places = [torch.tensor(torch.unravel_index(cell, shape)) for cell in cells]
    by_layer = {}
    for row, place in enumerate(places):
        by_layer.setdefault(int(place[0]), []).append((row, tuple(place[1:].tolist())))

    def hook_for(layer, rows):
        def hook(activation, hook):
            for row, place in rows:
                activation[(row, *place)] = clean[layer][(0, *place)]
            return activation

        return hook

    hooks = [(f"blocks.{layer}.{suffix}", hook_for(layer, rows)) for layer, rows in by_layer.items()]
    logits = bridge.run_with_hooks(task.corrupted.expand(len(cells), -1).contiguous(), fwd_hooks=hooks)
    return logit_diff(logits[:, -1], task)


def logit_diff(logits, task):
    """Right minus wrong answer."""
    return logits[:, task.answers[0, 0]] - logits[:, task.wrong[0, 0]]


def flops(model, task, site):
    """Arithmetic of the products that the sweep has to do: rows x layers x weights, twice.

    A patch at one position of z sends that row alone through the output projection and MLP of its own layer, and of
    the last layer only the last row's are needed.
    """
    d_model, d_mlp = model.d_model, model.d_mlp
    attention = 2 * d_model * (d_model + 2 * model.n_kv_heads * model.d_head)
    rest = 2 * (d_model * d_model + 3 * d_model * d_mlp)
    length, n_layers = task.clean.shape[1], model.n_layers
    first = int(task.first_difference[0])
    total = 0
    for layer in range(n_layers):
        for position in range(first, length):
            if site == "resid_pre" and layer == 0 and task.clean[0, position] == task.corrupted[0, position]:
                continue
            rows, copies = length - position, 9 if site == "z" else 1
            if site == "z":
                total += copies * (attention + rest)
            layers = n_layers - layer - (site == "z")
            if layers > 0:
                total += copies * (rows * layers * attention + (rows * (layers - 1) + 1) * rest)
    return total


if __name__ == "__main__":
    main()
