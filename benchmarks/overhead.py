"""What caching costs: `run_with_cache` of all residual streams and z, and TransformerLens's, beside the plain forward.

`python benchmarks/overhead.py [--out benchmarks/results/overhead.md]`: SmolLM2-135M, float32, one prompt of 14 tokens
and a batch of 16. All four are timed in turn in one run; the numbers are medians.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from machine import describe, interleaved_seconds

import interp

PROMPT = "When Mary and John went to the store, John gave a drink to"
SUFFIXES = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "attn.hook_z")


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()

    from transformer_lens.model_bridge import TransformerBridge

    model = interp.load("smollm2-135m")
    # The bridge changes the model it is given, so it gets its own; both run the same attention.
    bridged = copy.deepcopy(model.hf)
    bridge = TransformerBridge.boot_transformers("smollm2", hf_model=bridged, tokenizer=model.tokenizer, device="cpu")
    lines = [
        "# Overhead of caching\n",
        f"{describe()}; SmolLM2-135M, float32; median of {options.repeats} interleaved runs; sites: all residual "
        "streams and z (120 activations). The bridge switches its model to eager attention; the others run SDPA.\n",
        "| batch x tokens | run | ms | ratio to plain |",
        "|---|---|---|---|",
    ]
    for batch in (1, 16):
        tokens = model.to_tokens(PROMPT).repeat(batch, 1)
        seconds = interleaved_seconds(_runs(model, bridge, tokens), options.repeats)
        plain = seconds["plain transformers forward"]
        for name, value in seconds.items():
            lines.append(f"| {batch} x {tokens.shape[1]} | {name} | {value * 1e3:.1f} | {value / plain:.3f} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(table)


def _runs(model, bridge, tokens):
    wanted = lambda name: name.endswith(SUFFIXES)  # noqa: E731

    @torch.no_grad()
    def plain():
        return model.hf(tokens, use_cache=False).logits

    @torch.no_grad()
    def lens_cached():
        return bridge.run_with_cache(tokens, names_filter=wanted)

    assert len(model.run_with_cache(tokens, wanted)[1]) == 120
    return {
        "plain transformers forward": plain,
        "interp run_with_cache": lambda: model.run_with_cache(tokens, wanted),
        "interp, every site of the model": lambda: model.run_with_cache(tokens, "*"),
        "TransformerLens bridge run_with_cache": lens_cached,
    }


if __name__ == "__main__":
    main()
