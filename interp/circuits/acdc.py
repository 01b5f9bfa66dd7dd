"""ACDC: from the logits down, every edge whose removal changes little is removed for good.

1. Readers are visited from the logits to the first layer, their parents from the latest to the earliest.
2. An edge is cut on top of all those cut before it; if the metric gets worse by less than the threshold, it stays cut.
3. A reader that leads nowhere any more loses all its parents untested.

The order is that of one test after the other. But most edges go, so tests are run many at once on the guess that all
of them do: the k-th run of a batch cuts the first k candidates. Up to the first edge that has to stay, the runs are
those of the sequential order; the rest is run again. Layers before the reader are never run: nothing is cut there yet.

Source: Conmy et al. 2023 (arXiv 2304.14997).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from interp.circuits.circuit import Circuit
from interp.circuits.graph import Graph
from interp.circuits.split_run import Reference, SplitRun
from interp.circuits.writers import HeadOutputs, writer_outputs
from interp.metrics import Metric
from interp.model import Model
from interp.patching.activation import resolve_metric
from interp.patching.labels import provenance
from interp.patching.progress import progress_bar
from interp.tasks import Task

KL = "kl"
"""The default test: divergence of the circuit's prediction from the model's."""
TEST_BYTES = 2**29
"""Writers' outputs of the runs of one batch of tests."""


@torch.no_grad()
def acdc(
    model: Model,
    task: Task,
    *,
    threshold: float,
    metric: str | Metric = KL,
    absolute: bool = False,
    one_by_one: bool = False,
    progress: bool | None = None,
) -> Circuit:
    """The circuit that is left when every edge that can be cut has been, one after the other.

    Costs about as many runs as there are edges into nodes of the circuit, each from the reader's layer on.

    Args:
        model: a model whose stream is a sum of what is written.
        task: clean and corrupted prompts of one length; cut edges carry the corrupted run.
        threshold: how much worse an edge's removal may make the metric: nats for "kl"; else a share of the gap between
            the metric of clean and corrupted runs.
        metric: "kl", or as in `activation_patching`.
        absolute: count changes for the better as well (edges that hinder are kept).
        one_by_one: run test after test: the same circuit, slower; the oracle.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        The circuit; the score of an edge is how much worse its removal made things when it was tested, NaN if it was
        never tested because it led nowhere.

    Raises:
        ValueError: for prompts of several lengths, or a threshold that is not positive.
    """
    if threshold <= 0:
        raise ValueError(f"threshold={threshold}; it is greater than 0")
    started = time.perf_counter()
    tests = _Tests(model, task, metric)
    graph = tests.graph
    mask, scores = graph.exists.copy(), np.full(graph.exists.shape, np.nan, dtype=np.float32)
    current = tests.loss(mask[None], graph.n_layers - 1)[0]
    batch = 1
    with progress_bar(graph.n_edges, "acdc", "edge", progress=progress) as bar:
        for reader in reversed(range(len(graph.readers))):
            parents = list(reversed(range(graph.n_upstream[reader])))
            if reader < len(graph.readers) - 1 and not mask[graph.feeds[reader]].any():
                mask[:, reader] = False
                bar.update(len(parents))
                continue
            while parents:
                batch = 1 if one_by_one else min(max(batch, 1), tests.at_once(reader))
                tried = parents[:batch]
                losses = tests.loss(
                    _cut_in_turn(mask, tried, reader), int(min(graph.reader_layer[reader], graph.n_layers - 1))
                )
                n_done, current = _accept(mask, scores, tried, reader, losses, current, threshold, absolute)
                parents = parents[n_done:]
                bar.update(n_done)
                batch = 2 * batch if n_done == len(tried) else max(1, n_done)
    said = {
        **provenance(model, task),
        "method": "acdc",
        "metric": tests.metric_name,
        "threshold": threshold,
        "n_runs": tests.n_runs,
        "seconds": time.perf_counter() - started,
    }
    return Circuit(graph, scores, mask, said)


def _cut_in_turn(
    mask: Bool[ndarray, "writer reader"], writers: Sequence[int], reader: int
) -> Bool[ndarray, "circuit writer reader"]:
    """One circuit a candidate, each without the candidates up to its own."""
    masks = np.repeat(mask[None], len(writers), axis=0)
    for number, writer in enumerate(writers):
        masks[number:, writer, reader] = False
    return masks


def _accept(
    mask: Bool[ndarray, "writer reader"],
    scores: Float[ndarray, "writer reader"],
    tried: Sequence[int],
    reader: int,
    losses: Sequence[float],
    current: float,
    threshold: float,
    absolute: bool,
) -> tuple[int, float]:
    """Cut what may be cut, up to the first edge that stays; how many are decided, and the loss now."""
    for number, (writer, loss) in enumerate(zip(tried, losses, strict=True)):
        change = loss - current
        scores[writer, reader] = change
        if (abs(change) if absolute else change) >= threshold:
            return number + 1, current
        mask[writer, reader] = False
        current = loss
    return len(tried), current


@dataclass
class _Loss:
    """From logits [circuit, prompt, d_vocab] to one number a circuit that grows as things get worse."""

    prompts: Task
    metric: Metric | None
    prediction: Float[Tensor, "prompt d_vocab"]
    scale: float

    def __call__(self, logits: Float[Tensor, "circuit prompt d_vocab"]) -> list[float]:
        if self.metric is None:
            own = logits.float().log_softmax(-1)
            return [float(one) for one in (self.prediction.exp() * (self.prediction - own)).sum(-1).mean(-1)]
        answers, wrong = (ids.to(logits.device) for ids in (self.prompts.answers, self.prompts.wrong))
        return [-float(self.metric(one, answers, wrong).double().mean()) / self.scale for one in logits]


class _Tests:
    """Runs of circuits that differ from a given layer on."""

    def __init__(self, model: Model, task: Task, metric: str | Metric) -> None:
        groups = task.by_length()
        if len(groups) > 1:
            raise ValueError("acdc needs prompts of one length; task.by_length() cuts a task into such parts")
        self.model, (prompts,) = model, groups
        self.graph, heads = Graph.of(model), HeadOutputs(model)
        outputs, logits = writer_outputs(model, self.graph, prompts.clean, heads)
        reference, corrupted = writer_outputs(model, self.graph, prompts.corrupted, heads)
        self._differences = outputs - reference
        self._run = SplitRun(model, self.graph, prompts.clean, Reference(reference), heads)
        self.metric_name, metric_fn = (KL, None) if metric == KL else resolve_metric(metric, task)
        self._loss = _Loss(prompts, metric_fn, logits.float().log_softmax(-1), 1.0)
        if metric_fn is not None:
            gap = [self._loss(one[None])[0] for one in (corrupted, logits)]
            self._loss.scale = gap[0] - gap[1]
            if self._loss.scale == 0:
                raise ValueError(f"the metric {self.metric_name!r} is the same for clean and corrupted prompts")
        self.n_runs = 0

    def first_layer(self, reader: int) -> int:
        """The layer from which circuits that differ at a reader have to be run."""
        return int(min(self.graph.reader_layer[reader], self.graph.n_layers - 1))

    def at_once(self, reader: int) -> int:
        """Tests of one reader that fit into memory together."""
        layer = self.first_layer(reader)
        n_own = len(self.graph.writers) - (self.graph.head(layer, 0) if layer else 0)
        one = self._differences[0]
        return max(1, TEST_BYTES // (n_own * one.numel() * one.element_size()))

    def loss(self, masks: Bool[ndarray, "circuit writer reader"], first_layer: int) -> list[float]:
        """How bad each circuit is; they have every edge before a layer."""
        self.n_runs += len(masks)
        chosen = torch.from_numpy(masks).to(self.model.device, torch.float32)
        return self._loss(self._run.logits(chosen, differences=self._differences, first_layer=first_layer))
