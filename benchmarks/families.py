"""Which invariant holds for which family: runs `tests/model/test_families.py` and writes its outcome as a table.

`python benchmarks/families.py [--out benchmarks/results/families.md]`: about a minute on one core. The exit
code is that of pytest.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "model" / "test_families.py"
CASE = re.compile(r"::test_(?P<invariant>\w+)\[(?P<family>[^/]+)/(?P<implementation>[a-z]+)")
NOTES = f"""
A cell is ✓ if the invariant holds under every attention implementation listed, ✗ if it fails under one, and a letter if
it does not apply. Where a family lacks a site, asking for it raises `interp.SiteUnavailable`, which says why; that is
what the column `unavailable_sites` checks.

"Equal to transformers" means: to `hf(**inputs, use_cache=False)`, which is how `interp` runs a forward pass. With the
KV cache, their default, GPT-2, OPT, GPT-J, GPT-Neo and Falcon hold keys and values in another memory layout, and the
same sums differ by rounding (at most 1.2e-6 here). `logits_equal` also checks that this stays below 5e-6.

Falcon with ALiBi computes different logits under SDPA and eager attention in transformers itself (0.13 apart on the
tiny model here); `interp` equals each of them.

Written by `python benchmarks/{Path(__file__).name}`.
"""


class Outcomes:
    """A pytest plugin that keeps what happened to each (family, invariant)."""

    def __init__(self) -> None:
        self.reports: dict[tuple[str, str], list[pytest.TestReport]] = defaultdict(list)
        self.implementations: dict[str, list[str]] = defaultdict(list)
        self.meanings: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        """Take each invariant's meaning from the docstring of its test."""
        for item in items:
            self.meanings[item.originalname.removeprefix("test_")] = " ".join((item.obj.__doc__ or "").split())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the call, and whatever stopped a test before or after it."""
        if report.when != "call" and report.passed:
            return
        found = CASE.search(report.nodeid)
        if found is not None:
            self.reports[found["family"], found["invariant"]].append(report)
            if found["implementation"] not in self.implementations[found["family"]]:
                self.implementations[found["family"]].append(found["implementation"])


def reason_of(reports: list[pytest.TestReport]) -> str | None:
    """Why an invariant was skipped in every case, None if it was checked in any."""
    if not all(report.skipped for report in reports):
        return None
    where = reports[0].longrepr
    assert isinstance(where, tuple)
    return str(where[2]).removeprefix("Skipped: ")


def table(outcomes: Outcomes, machine: str) -> str:
    """The whole page as markdown."""
    letters: dict[str, str] = {}

    def cell(family: str, invariant: str) -> str:
        reports = outcomes.reports[family, invariant]
        if any(report.failed for report in reports):
            return "✗"
        reason = reason_of(reports)
        return "✓" if reason is None else letters.setdefault(reason, chr(ord("a") + len(letters)))

    invariants = list(outcomes.meanings)
    lines = [f"| family | attention | {' | '.join(invariants)} |", "|---" * (len(invariants) + 2) + "|"]
    for family, implementations in outcomes.implementations.items():
        cells = [cell(family, invariant) for invariant in invariants]
        lines.append(f"| {family} | {', '.join(implementations)} | {' | '.join(cells)} |")
    meanings = [f"- `{name}`: {meaning}" for name, meaning in outcomes.meanings.items()]
    footnotes = [f"- {letter}: {reason}" for reason, letter in letters.items()]
    return "\n".join(
        [
            "# Families and invariants\n",
            "Tiny random models, float32 (gradients: float64). A name after a hyphen is a variant of the family.\n",
            f"{machine}.\n",
            *lines,
            "",
            *footnotes,
            "\n## What is checked\n",
            *meanings,
            NOTES,
        ]
    )


def main() -> int:
    """Run the tests and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    outcomes = Outcomes()
    sys.path.insert(0, str(ROOT))
    code = pytest.main([str(TESTS), "-q", "--tb=no", f"--rootdir={ROOT}", "-p", "no:cacheprovider"], plugins=[outcomes])
    # Only now: pytest rewrites the assertions of its plugins, and complains of those that transformers imported before.
    from machine import describe

    page = table(outcomes, describe())
    if options.out is None:
        print(page)
    else:
        options.out.write_text(page.rstrip() + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
