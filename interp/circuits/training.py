"""What gates and constants are trained on: prompts in batches, and how far a circuit is from the model there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.evaluate import reference_of
from interp.circuits.graph import Graph
from interp.circuits.split_run import Mask, SplitRun
from interp.circuits.writers import HeadOutputs
from interp.metrics import kl_divergence
from interp.model import Model
from interp.tasks import Task

STEP_BYTES = 2**30
"""Writers' outputs that a step keeps for its backward pass."""
PROMPTS_A_STEP = 8
"""Prompts a step if there is room for them."""


class CircuitTraining:
    """A task in random batches of prompts of one length.

    Args:
        model: a model whose stream is a sum of what is written.
        task: clean and corrupted prompts.
        batch_size: prompts a step; None: 8, or as many as fit 1 GB.
        generator: draws the batches.

    Raises:
        ValueError: for a batch size below 1.
        SiteUnavailable: for a model whose stream is normed after every addition.
    """

    def __init__(self, model: Model, task: Task, batch_size: int | None, generator: torch.Generator) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; it is at least 1, or None")
        self.model, self.graph, self.heads = model, Graph.of(model), HeadOutputs(model)
        self.groups = task.by_length()
        self._generator = generator
        self.batches = [
            group[rows.tolist()]
            for group in self.groups
            for rows in _even_parts(group, batch_size or self._prompts_that_fit(group), generator)
        ]
        """The prompts, each in one batch."""

    def _prompts_that_fit(self, group: Task) -> int:
        # The mixture of every attention layer and MLP keeps the outputs of all writers before it.
        kept = self.graph.n_layers * len(self.graph.writers)
        a_prompt = kept * len(group.clean_ids[0]) * self.model.d_model * 4
        return max(1, min(STEP_BYTES // a_prompt, PROMPTS_A_STEP))

    def forever(self) -> Iterator[Task]:
        """All batches in a random order, then again in another, without end."""
        while True:
            for index in torch.randperm(len(self.batches), generator=self._generator).tolist():
                yield self.batches[index]

    def divergence(
        self, masks: Mask, prompts: Task, constants: Float[Tensor, "writer d_model"] | None = None
    ) -> Float[Tensor, "circuit prompt"]:
        """KL (nats) of each circuit's prediction from the model's; differentiable in masks that need a gradient.

        Args:
            masks: 1 where an edge is there, 0 where it is cut.
            prompts: one of the batches.
            constants: what cut edges carry; None: the corrupted run.

        Raises:
            FloatingPointError: if it is NaN or infinite.
        """
        with torch.no_grad():
            full = self.model.last_logits(prompts.clean)
        reference = reference_of(self.model, prompts, self.graph, self.heads, "resample", constants)
        logits = SplitRun(self.model, self.graph, prompts.clean, reference, self.heads).logits(masks)
        divergence = kl_divergence(full.expand_as(logits).flatten(0, 1), logits.flatten(0, 1))
        if not bool(divergence.isfinite().all()):
            raise FloatingPointError("the divergence of a circuit is NaN or infinite: check weights, dtype")
        return divergence.unflatten(0, logits.shape[:2])


def _even_parts(group: Task, most: int, generator: torch.Generator) -> Sequence[Tensor]:
    """Rows of a task in random parts of about the same size, so that no prompt weighs more than another."""
    return torch.randperm(len(group), generator=generator).tensor_split(-(-len(group) // most))
