"""What attention statistics cost without the patterns: memory at 8,192 tokens, time at 2,048 beside eager attention.

`python benchmarks/attention_stats.py [--out benchmarks/results/attention_stats.md]`: SmolLM2-135M, float32, one prompt
of random tokens. Memory: the peak of a process of its own, above what it holds once the model is loaded,
with statistics and for a plain forward pass; and of the kernel alone on one layer's queries and keys. Time: statistics
by the kernel, and from the patterns that eager attention computes anyway, in interleaved runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from machine import describe, interleaved_seconds, peak_memory

import interp
from interp.heads import attention_received, attention_statistics
from interp.heads.attention_calls import attention_modules
from interp.kernels.attention_stats import attention_stats
from interp.model.attention import attention_wrapped

HEADS, KV_HEADS, D_HEAD = 9, 3, 64
"""Of SmolLM2-135M."""


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--long", type=int, default=8192, help="tokens of the memory table")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the time table")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=MEASURED, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(peak_of(MEASURED[options.only](options.long)))
        return
    table = "\n".join(
        [
            "# Attention statistics\n",
            f"{describe()}; SmolLM2-135M, float32, one prompt.\n",
            *memory(options.long),
            *time(options.length, options.repeats),
        ]
    )
    print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(table + "\n")


def memory(length):
    """The memory table: each row measured in a fresh process."""
    command = [sys.executable, __file__, "--long", str(length), "--only"]
    peak = {
        name: float(subprocess.run([*command, name], check=True, capture_output=True, text=True).stdout.split()[-1])
        for name in MEASURED
    }
    pattern = HEADS * length**2 * 4 / 1e6
    extra = {
        "sink statistics of the model, beyond a plain forward pass": max(0, peak["statistics"] - peak["plain"]),
        "kernel alone, one layer, all statistics": peak["kernel"],
    }
    return [
        f"## Memory at {length:,} tokens\n",
        f"The eager pattern of one layer needs {pattern:,.0f} MB ({HEADS} heads x {length:,}² x 4 bytes). A plain "
        f"forward pass needs {peak['plain']:,.0f} MB at its peak, with sink statistics of every layer "
        f"{peak['statistics']:,.0f} MB.\n",
        "| what | peak extra memory, MB | of one eager pattern |",
        "|---|---|---|",
        *(f"| {name} | {value:,.1f} | {value / pattern:.2%} |" for name, value in extra.items()),
    ]


def time(length, repeats):
    """The time table."""
    model, tokens = interp.load("smollm2-135m"), random_tokens(length)
    rows = {
        "attention received": (partial(attention_received, model, tokens, progress=False), received),
        "entropy, distance, first token": (partial(attention_statistics, model, tokens, progress=False), spread),
    }
    runs = {"plain": partial(model.last_logits, tokens)}
    for name, (streaming, from_pattern) in rows.items():
        runs[name] = streaming
        runs[f"{name}, eager"] = partial(eager, model, tokens, from_pattern)
    seconds = interleaved_seconds(runs, repeats)
    lines = [
        f"\n## Time at {length:,} tokens\n",
        f"All layers, the forward pass included (a plain one takes {seconds['plain']:.2f} s); median of {repeats} "
        "interleaved runs. Eager: the statistic from the pattern that eager attention has computed.\n",
        "| statistic | kernel, s | eager, s | kernel / eager |",
        "|---|---|---|---|",
    ]
    for name in rows:
        ours, theirs = seconds[name], seconds[f"{name}, eager"]
        lines.append(f"| {name} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} |")
    return lines


@torch.no_grad()
def eager(model, tokens, from_pattern):
    """A forward pass under eager attention with a statistic of each pattern as it comes."""

    def see(call):
        result = call.run()
        found.append(from_pattern(result[1]))
        return result

    found = []
    before = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("eager")
    try:
        modules = attention_modules(model, range(model.n_layers)).values()
        with attention_wrapped(dict.fromkeys(modules, see)):
            model.last_logits(tokens)
    finally:
        model.hf.set_attn_implementation(before)
    return found


def received(pattern):
    """Column sums."""
    return pattern.sum(2)


def spread(pattern):
    """Entropy, distance and attention to the first token of each row."""
    positions = torch.arange(pattern.shape[-1])
    distance = (pattern * (positions[:, None] - positions).abs()).sum(-1)
    return torch.special.entr(pattern).sum(-1), distance, pattern[..., 0]


def random_tokens(length):
    """One prompt, [1, length]."""
    return torch.randint(100, 49_000, (1, length), generator=torch.Generator().manual_seed(0))


def plain_run(length):
    """A forward pass without statistics."""
    model, tokens = interp.load("smollm2-135m"), random_tokens(length)
    model.last_logits(tokens[:, :64])
    return partial(model.last_logits, tokens)


def statistics_run(length):
    """A forward pass with the attention that every position receives, in every layer."""
    model, tokens = interp.load("smollm2-135m"), random_tokens(length)
    attention_received(model, tokens[:, :64], progress=False)
    return partial(attention_received, model, tokens, progress=False)


def kernel_run(length):
    """The kernel on queries and keys of one layer's size."""
    query, key = torch.randn(1, HEADS, length, D_HEAD), torch.randn(1, KV_HEADS, length, D_HEAD)
    first = torch.zeros(1, 1, length, dtype=torch.bool)
    first[..., 0] = True
    run = partial(attention_stats, scale=D_HEAD**-0.5, key_sets=first, offsets=(1, 0))
    run(query[:, :, :64], key[:, :, :64], key_sets=first[..., :64])
    return partial(run, query, key)


MEASURED = {"plain": plain_run, "statistics": statistics_run, "kernel": kernel_run}


def peak_of(run):
    """MB that a call needs at its peak, above what the process holds before it."""
    with peak_memory() as seen:
        run()
    return seen.megabytes


if __name__ == "__main__":
    main()
