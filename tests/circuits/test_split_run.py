"""Runs with cut edges: against the plain model, against path patching, and against themselves in other batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp.circuits.exact_edges import exact_edge_scores
from interp.circuits.graph import Graph
from interp.circuits.split_run import Reference, SplitRun
from interp.circuits.writers import HeadOutputs, writer_outputs
from interp.patching import edge_effects
from tests.circuits.tiny import EDGE_FAMILIES, TEXT_FAMILIES, tiny_model, tiny_task

ROUNDED = {"gemma2", "gemma3_text", "olmo2"}
"""Families whose norms round to float32 inside, where the parts of a sum meet the sum."""


def runs(name, task):
    model = tiny_model(name)
    graph, heads = Graph.of(model), HeadOutputs(model)
    clean, clean_logits = writer_outputs(model, graph, task.clean, heads)
    corrupted, corrupted_logits = writer_outputs(model, graph, task.corrupted, heads)
    run = SplitRun(model, graph, task.clean, Reference(corrupted), heads)
    return run, clean - corrupted, clean_logits, corrupted_logits


def whole(graph):
    return torch.from_numpy(graph.exists).double()


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_all_edges_give_the_model_and_none_the_reference(name):
    run, _, clean, corrupted = runs(name, tiny_task())
    exists = whole(run.graph)
    full, empty = run.logits(torch.stack([exists, exists * 0]))
    tolerance = 1e-5 if name in ROUNDED else 1e-10
    torch.testing.assert_close(full, clean, atol=tolerance, rtol=0)
    torch.testing.assert_close(empty, corrupted, atol=tolerance, rtol=0)
    assert (clean - corrupted).abs().max() > 1e-2


@pytest.mark.parametrize("name", EDGE_FAMILIES)
def test_later_starts_and_batches_change_nothing(name):
    run, differences, *_ = runs(name, tiny_task())
    graph = run.graph
    generator = torch.Generator().manual_seed(0)
    masks = whole(graph).repeat(3, 1, 1)
    layer = graph.n_layers - 1
    late = torch.from_numpy(graph.reader_layer) >= layer
    masks[:, :, late] *= torch.rand(3, len(graph.writers), int(late.sum()), generator=generator) > 0.4
    together = run.logits(masks)
    from_there = run.logits(masks, differences=differences, first_layer=layer)
    one_by_one = torch.cat([run.logits(mask[None]) for mask in masks])
    by_position = run.logits(masks[:, None].expand(-1, 7, -1, -1))
    for other in (from_there, one_by_one, by_position):
        torch.testing.assert_close(together, other, atol=5e-6, rtol=0)
    torch.testing.assert_close(run.differences(whole(graph)), differences, atol=5e-6, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_edges_can_be_cut_at_one_position_alone():
    task = tiny_task()
    run, _, clean, _ = runs("llama", task)
    masks = whole(run.graph).repeat(2, 7, 1, 1)
    masks[0, 6, :, -1] = 0  # what the logits see at the last position: all that is read
    masks[1, 5, :, -1] = 0
    end, before = run.logits(masks)
    assert (end - clean).abs().max() > 1e-2
    torch.testing.assert_close(before, clean, atol=1e-10, rtol=0)


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("name", [name for name in EDGE_FAMILIES if name not in ("gemma3_text", "gptj")])
def test_single_edges_are_paths(name, direction):
    """Path patching comes another way to the same number: through the sweep engine, one reader's input at a time.

    (Behind a norm after attention the two differ by definition: here each head keeps its share of the sum's scale.)
    """
    model, task = tiny_model(name), tiny_task()
    exact = exact_edge_scores(model, task, direction=direction)
    graph = Graph.of(model)
    pairs = [(graph.writers[writer], graph.readers[reader]) for writer, reader in np.argwhere(graph.exists)[::9]]
    paths = edge_effects(model, task, [[pair] for pair in pairs], direction=direction)
    found = [float(exact.sel(writer=writer, reader=reader)) for writer, reader in pairs]
    np.testing.assert_allclose(found, paths.values, atol=1e-5)
    assert np.abs(found).max() > 0.05
