"""How much of IOI the features of largest effect carry, by integrated gradients and by RelP, beside random features.

`python benchmarks/feature_circuits.py [--folder build/saes] [--out benchmarks/results/feature_circuits.md]`:
SmolLM2-135M, float32, with the SAEs of `benchmarks/sae_training.py`, which are trained if they are not in the folder.
Effects on some prompts, faithfulness and completeness on others. Integrated gradients go ten steps for each SAE; at
equal cost they have as many fewer prompts as they need more passes a prompt.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import sae_training
from machine import describe

import interp
from interp import saes

SIZES = (5, 10, 20, 50, 100, 200, 500, 1000)


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=sae_training.FOLDER)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--test-prompts", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = interp.load("smollm2-135m")
    trained = [sae_training.train(model, site, options.folder) for site in sae_training.SITES]
    found_on = interp.tasks.ioi(model, n=options.prompts, seed=0)
    tested_on = interp.tasks.ioi(model, n=options.test_prompts, seed=1)
    lines = [
        "# Circuits of SAE features: IOI\n",
        f"{describe()}; SmolLM2-135M, float32, TopK SAEs (k = 32) at {', '.join(str(one.site) for one in trained)}. "
        f"Effects on {options.prompts} prompts, faithfulness on {options.test_prompts} others; positions together.",
        *curves(model, trained, found_on, tested_on),
    ]
    table = "\n".join(lines) + "\n"
    print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(table)


def curves(model, trained, found_on, tested_on):
    """A table for each way to treat errors: faithfulness (completeness) by number of nodes."""
    found = {name: effects(model, trained, task, **how) for name, task, how in ways(found_on, len(trained))}
    lines = []
    for errors in ("nodes", "keep"):
        lines += [
            f'\n## Errors: "{errors}"\n',
            "Faithfulness of so many nodes (of all others in brackets: completeness, lower is better).\n",
            row("method", "prompts", "passes a prompt", "s", *map(str, SIZES)),
            "|---" * (4 + len(SIZES)) + "|",
        ]
        for name, (task, one) in found.items():
            draws = 3 if name == "RelP" else 0
            curve = saes.feature_faithfulness(
                model, tested_on, trained, one, SIZES, errors=errors, n_random=draws, progress=False
            )
            if draws:
                spans = [f"{some.min():.2f} to {some.max():.2f}" for some in curve["random"].values.T]
            pairs = zip(curve["faithfulness"].values, curve["completeness"].values, strict=True)
            passes = one.attrs["forward_passes"] + one.attrs["backward_passes"]
            numbers = [str(len(task)), str(passes), f"{one.attrs['seconds']:.0f}"]
            lines.append(row(name, *numbers, *(f"{kept:.2f} ({left:.2f})" for kept, left in pairs)))
            print(lines[-1], flush=True)
        whole, empty = curve.attrs["metric_model"], curve.attrs["metric_empty"]
        lines += [row("random (3 draws)", "", "", "", *spans), f"\nMetric: model {whole:.3f}, all ablated {empty:.3f}."]
    return lines


def row(*cells):
    """A row of a table."""
    return "| " + " | ".join(cells) + " |"


def ways(task, n_saes, steps=10):
    """(name, prompts, options of `feature_effects`)."""
    few = max(1, round(len(task) * 3 / (2 + 2 * steps * n_saes)))
    return [
        ("RelP", task, {"method": "relp"}),
        ("RelP through features", task, {"method": "relp", "through": "features"}),
        ("attribution", task, {"method": "attribution"}),
        (f"IG, {steps} steps", task, {"method": "ig", "steps": steps}),
        (f"IG, {steps} steps, equal cost", task[:few], {"method": "ig", "steps": steps}),
        ("IG, 1 step, equal cost", task[: round(len(task) * 3 / (2 + 2 * n_saes))], {"method": "ig", "steps": 1}),
    ]


def effects(model, trained, task, **how):
    """The prompts, and effects on them."""
    return task, saes.feature_effects(model, task, trained, by_position=False, progress=False, **how)


if __name__ == "__main__":
    main()
