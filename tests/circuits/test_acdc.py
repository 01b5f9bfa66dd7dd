"""ACDC in batches against ACDC test by test, and against a plain loop over circuits."""

from __future__ import annotations

import numpy as np
import pytest

from interp.circuits.acdc import acdc
from interp.circuits.evaluate import run_circuits
from interp.circuits.graph import Graph
from interp.metrics import logit_diff
from tests.circuits.tiny import EDGE_FAMILIES, tiny_model, tiny_task


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(("metric", "threshold"), [("kl", 1e-3), ("logit_diff", 0.02)])
@pytest.mark.parametrize("name", EDGE_FAMILIES)
def test_batches_keep_the_edges_of_the_sequential_order(name, metric, threshold, absolute):
    model, task = tiny_model(name), tiny_task()
    options = {"threshold": threshold, "metric": metric, "absolute": absolute}
    together = acdc(model, task, **options)
    one_by_one = acdc(model, task, **options, one_by_one=True)
    assert (together.mask == one_by_one.mask).all()
    np.testing.assert_allclose(together.scores, one_by_one.scores, atol=1e-6)
    assert 0 < together.n_edges < together.graph.n_edges


def test_a_plain_loop_over_whole_runs_keeps_the_same_edges():
    """Independent of the engine's later starts: every test is a run of the whole circuit, every edge is tested."""
    model, task, threshold = tiny_model("llama"), tiny_task(), 0.02
    graph = Graph.of(model)

    def value(mask):
        read = {"metric": lambda logits, prompts: logit_diff(logits, prompts.answers, prompts.wrong)}
        return float(run_circuits(model, task, graph, mask[None], read)["metric"].double().mean())

    mask = graph.exists.copy()
    full, empty = value(mask), value(~graph.exists & False)
    current = full
    for reader in reversed(range(len(graph.readers))):
        for writer in reversed(range(graph.n_upstream[reader])):
            mask[writer, reader] = False
            after = value(mask)
            if (current - after) / (full - empty) >= threshold:
                mask[writer, reader] = True
            else:
                current = after
    assert (acdc(model, task, threshold=threshold, metric="logit_diff").mask == mask).all()


def test_bad_choices_are_refused():
    model, task = tiny_model("gpt2"), tiny_task()
    with pytest.raises(ValueError, match="threshold=0"):
        acdc(model, task, threshold=0)
