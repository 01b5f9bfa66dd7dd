"""Optimal ablation: what cut edges carry is one constant vector a writer, trained to do the least harm.

A mean or zero activation is one that the model may never have seen, so that part of the harm of an ablation is that of
the wrong constant. The best constant leaves only what is lost for want of the component's information.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from interp.circuits.evaluate import mean_outputs
from interp.circuits.training import CircuitTraining
from interp.model import Model
from interp.patching.progress import progress_bar
from interp.tasks import Task


def optimal_constants(
    model: Model,
    task: Task,
    *,
    masks: Bool[ndarray, "circuit *pos writer reader"] | None = None,
    steps: int = 300,
    learning_rate: float = 2e-3,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Float[Tensor, "writer d_model"]:
    """Constants for cut edges that keep circuits' predictions as near to the model's as constants can.

    They start at the mean over clean prompts and positions, and go down the mean KL of the prediction from the model's
    (nats) by Adam, whose learning rate falls to 0. Costs about five forward passes a step, and keeps
    n_layers × n_writers × d_model floats for every token of a batch.

    >>> constants = optimal_constants(model, task, masks=circuit.mask[None])
    >>> evaluate(model, task, circuit, constants=constants)

    Args:
        model: a model whose stream is a sum of what is written.
        task: clean prompts; corrupted ones and answers play no part.
        masks: the edges of the circuits that the constants are to serve: each step trains on one of them, drawn at
            random. Circuits are compared fairly when each has constants of its own. None: constants for circuits of
            every size: for each step a share is drawn from 0..1, and each edge cut with that probability.
        steps: training steps.
        learning_rate: at the first step, in the units of activations.
        seed: of all draws; the same seed gives the same constants.
        batch_size: prompts a step; by default 8, or as many as fit 1 GB.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        One vector a writer, in the order of `Graph.writers`, for `run_circuits` and `evaluate`. Writers that
        no circuit ablates keep their mean.

    Raises:
        ValueError: for masks that do not fit the graph, steps, learning rate or batch size out of range.
        SiteUnavailable: for a model whose stream is normed after every addition.
        FloatingPointError: if a prediction is NaN or infinite.

    Source: Li & Janson 2024 (arXiv 2409.09951).
    """
    for what, value in (("steps", steps), ("learning_rate", learning_rate)):
        if not value > 0:
            raise ValueError(f"{what}={value}; it is greater than 0")
    generator = torch.Generator().manual_seed(seed)
    circuits = CircuitTraining(model, task, batch_size, generator)
    draw = _drawing(circuits, masks, generator)
    exists = torch.from_numpy(circuits.graph.exists).to(model.device)
    constants = mean_outputs(model, circuits.groups, circuits.graph, circuits.heads).requires_grad_()
    optimiser = torch.optim.Adam([constants], lr=learning_rate)
    falling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=steps)
    batches = circuits.forever()
    with torch.enable_grad(), progress_bar(steps, "optimal ablation", "step", progress=progress) as bar:
        for _ in range(steps):
            # A run keeps its graph only for masks that need a gradient; it is then there for the constants as well.
            kept = draw().to(model.device)
            mask = kept.to(torch.float32)[None].requires_grad_()
            loss = circuits.divergence(mask, next(batches), constants).mean()
            (gradient,) = torch.autograd.grad(loss, [constants])
            # The gradient of a writer that is not cut is 0 but for rounding, of which Adam would make whole steps.
            is_cut = (~kept & exists).any(-1).reshape(-1, len(constants)).any(0)
            constants.grad = gradient * is_cut[:, None]
            optimiser.step()
            falling.step()
            bar.set_postfix(kl=f"{loss.detach():.4f}")
            bar.update(1)
    return constants.detach()


def _drawing(
    circuits: CircuitTraining, masks: Bool[ndarray, "circuit *pos writer reader"] | None, generator: torch.Generator
) -> Callable[[], Bool[Tensor, "*pos writer reader"]]:
    """What draws the circuit of a step.

    Raises:
        ValueError: for masks of another shape.
    """
    edges = circuits.graph.exists.shape
    if masks is None:
        return lambda: torch.rand(edges, generator=generator) >= torch.rand(1, generator=generator)
    if masks.ndim not in (3, 4) or not len(masks) or masks.shape[-2:] != edges:
        raise ValueError(f"masks have the shape {masks.shape}; this graph's are [circuit, ..., {edges}]")
    lengths = {len(group.clean_ids[0]) for group in circuits.groups}
    if masks.ndim == 4 and lengths != {masks.shape[1]}:
        found = ", ".join(map(str, sorted(lengths)))
        raise ValueError(f"masks are for prompts of {masks.shape[1]} tokens; this task has prompts of {found}")
    known = torch.from_numpy(np.ascontiguousarray(masks))
    return lambda: known[int(torch.randint(len(known), (1,), generator=generator))]
