"""Circuits by training: a gate on every node or edge, and a price on gates that are open.

1. Every gate is a hard-concrete random number: it is drawn anew for each step, and how likely it is open is learned.
2. What a closed gate cuts carries the corrupted run; a gate half open lets through a mixture.
3. The loss is the divergence of such a run's prediction from the model's, and what open gates cost.

The model's weights are not trained. Scores are the gates' probabilities to be open: nothing is drawn in the end, and a
threshold of 0.5 gives the circuit.

Sources: subnetwork probing, Cao et al. 2021 (arXiv 2104.03514), as ACDC was compared with; edge pruning, Bhaskar et al.
2024 (arXiv 2406.16778).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.circuits.edge_scores import labelled_edges
from interp.circuits.hard_concrete import log_alpha_of, median_gates, open_probability, sampled_gates
from interp.circuits.node_scores import node_array
from interp.circuits.split_run import Mask
from interp.circuits.training import CircuitTraining
from interp.model import Model
from interp.patching.labels import provenance
from interp.patching.progress import progress_bar
from interp.tasks import Task

BEGIN_OPEN = 0.98
"""How likely a gate is open before training."""
WARM_UP = 0.7
"""Share of the steps in which edge pruning raises its target."""
FIRMNESS, ASCENT = 300.0, 20.0
"""Of edge pruning's constraint: weight of the squared miss, and what the multiplier grows by a step and miss."""
ROUNDING = 1e-6
"""A divergence (nats) that is not more than this is none."""


def subnetwork_probing_scores(
    model: Model,
    task: Task,
    *,
    penalty: float = 0.01,
    steps: int = 200,
    learning_rate: float = 0.1,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Subnetwork probing: how likely a learned gate on each head and MLP is open.

    Loss = mean KL of the prediction from the model's (nats) + penalty · expected number of open gates, by Adam. Costs
    about six forward passes a step, and keeps n_layers × n_writers × d_model floats for every token of a batch.

    Args:
        model: a model whose stream is a sum of what is written.
        task: clean and corrupted prompts; answers play no part.
        penalty: nats that an open gate costs. Gates begin open, and those of nodes whose absence costs more than about
            a third of it stay so. (The reference's λ is this times the number of nodes.)
        steps: training steps, each on one batch and one draw of all gates.
        learning_rate: of log_alpha.
        seed: of batches and gates; the same seed gives the same scores.
        batch_size: prompts a step; by default 8, or as many as fit 1 GB.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Probabilities over `node`; that of the embedding, which has no gate, is 1. The attr `kl` is the mean divergence
        with every gate at its median, `n_open` the number of gates at 0.5 or above.

    Raises:
        ValueError: for steps, penalty, learning rate or batch size out of range.
        SiteUnavailable: for a model whose stream is normed after every addition.
        FloatingPointError: if a prediction is NaN or infinite.

    Unlike the reference, a head has one gate on its output instead of three on query, key and value, scores are not
    drawn at random, and a larger learning rate makes up for fewer steps.
    """
    if penalty < 0:
        raise ValueError(f"penalty={penalty}; it is 0 or greater")
    training = _Training(model, task, steps, learning_rate, seed, batch_size, progress, "subnetwork probing")
    n_writers = len(training.circuits.graph.writers)

    def masks(gates: Tensor) -> Tensor:
        with_embed = torch.cat([gates.new_ones(1), gates])
        return with_embed[None, :, None].expand(1, -1, len(training.circuits.graph.readers))

    def price(probability: Tensor, step: int) -> Tensor:
        return penalty * probability.sum()

    probability = training.run(n_writers - 1, masks, price)
    attrs = training.attrs({"method": "subnetwork-probing", "penalty": penalty})
    names = training.circuits.graph.writers
    return node_array(names, dict(zip(names, [1.0, *probability.tolist()], strict=True)), attrs)


def edge_pruning_scores(
    model: Model,
    task: Task,
    *,
    sparsity: float = 0.95,
    steps: int = 300,
    learning_rate: float = 0.1,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Edge pruning: how likely a learned gate on each edge is open, when only so many may be.

    Loss = mean KL of the prediction from the model's (nats) + D·(a·m + 300·m²). m is the expected share of closed
    gates less its target, which rises from 0 to `sparsity` over 70 % of the steps; a grows by 20·m a step; D is the
    divergence of a run with every edge cut. Cost and memory are those of `subnetwork_probing_scores`.

    Args:
        model: a model whose stream is a sum of what is written.
        task: clean and corrupted prompts; answers play no part.
        sparsity: share of all edges to be cut.
        steps: training steps, each on one batch and one draw of all gates.
        learning_rate: of log_alpha, by Adam.
        seed: as in `subnetwork_probing_scores`.
        batch_size: as in `subnetwork_probing_scores`.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Probabilities over [writer, reader]; NaN where there is no edge. Attrs as of `subnetwork_probing_scores`.

    Raises:
        ValueError: for a sparsity outside 0..1, steps, learning rate or batch size out of range, or if a run with every
            edge cut predicts what the model does.
        SiteUnavailable: for a model whose stream is normed after every addition.
        FloatingPointError: if a prediction is NaN or infinite.

    Unlike the reference, which multiplies gates of edges and of writers, there are gates of edges alone; the weight of
    m² is not trained, and m is of the gates' probabilities, not of a draw. Both make so few steps come to rest.
    """
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity={sparsity}; it is the share of edges to be cut, between 0 and 1")
    training = _Training(model, task, steps, learning_rate, seed, batch_size, progress, "edge pruning")
    graph = training.circuits.graph
    where = torch.from_numpy(graph.exists).to(model.device)

    def masks(gates: Tensor) -> Tensor:
        return gates.new_zeros(1, *where.shape).masked_scatter(where[None], gates)

    scale = float(training.divergence(masks(torch.zeros(graph.n_edges, device=model.device))).mean())
    if not scale > ROUNDING:
        raise ValueError("a run with every edge cut predicts what the model does: there is no behaviour to keep")
    multiplier = 0.0

    def price(probability: Tensor, step: int) -> Tensor:
        nonlocal multiplier
        miss = 1 - probability.mean() - sparsity * min(1.0, step / (WARM_UP * steps))
        multiplier += ASCENT * float(miss.detach())
        return scale * (multiplier * miss + FIRMNESS * miss.square())

    probability = training.run(graph.n_edges, masks, price)
    scores = np.zeros(graph.exists.shape)
    scores[graph.exists] = probability.numpy()
    return labelled_edges(graph, scores, training.attrs({"method": "edge-pruning", "sparsity": sparsity}))


class _Training:
    """Gates and the steps that train them."""

    def __init__(
        self,
        model: Model,
        task: Task,
        steps: int,
        learning_rate: float,
        seed: int,
        batch_size: int | None,
        progress: bool | None,
        name: str,
    ) -> None:
        for what, value in (("steps", steps), ("learning_rate", learning_rate)):
            if not value > 0:
                raise ValueError(f"{what}={value}; it is greater than 0")
        self.model, self.task, self.steps, self.learning_rate = model, task, steps, learning_rate
        self.seed, self.progress, self.name = seed, progress, name
        self._started = time.perf_counter()
        self._generator = torch.Generator().manual_seed(seed)
        self.circuits = CircuitTraining(model, task, batch_size, self._generator)
        self._found: dict[str, Any] = {}

    def run(
        self, n_gates: int, masks: Callable[[Tensor], Tensor], price: Callable[[Tensor, int], Tensor]
    ) -> Float[Tensor, " gate"]:
        """Train gates; the probability of each to be open.

        Args:
            n_gates: how many.
            masks: from gates to edges.
            price: from probabilities and the number of the step to what the loss has beside the divergence.
        """
        log_alpha = torch.full((n_gates,), log_alpha_of(BEGIN_OPEN), device=self.model.device, requires_grad=True)
        # With many gates and a small divergence, gradients come near Adam's usual eps.
        optimiser = torch.optim.Adam([log_alpha], lr=self.learning_rate, eps=1e-12)
        batches = self.circuits.forever()
        with torch.enable_grad(), progress_bar(self.steps, self.name, "step", progress=self.progress) as bar:
            for step in range(1, self.steps + 1):
                gates = sampled_gates(log_alpha, self._generator)
                divergence = self.circuits.divergence(masks(gates), next(batches)).mean()
                probability = open_probability(log_alpha)
                loss = divergence + price(probability, step)
                # Not backward(): parameters of the model would get gradients too.
                (log_alpha.grad,) = torch.autograd.grad(loss, [log_alpha])
                optimiser.step()
                closed = 1 - probability.detach().mean()
                bar.set_postfix(kl=f"{divergence.detach():.4f}", closed=f"{closed:.1%}")
                bar.update(1)
        trained = log_alpha.detach()
        probability = open_probability(trained.double()).cpu()
        self._found = {
            "kl": float(self.divergence(masks(median_gates(trained))).mean()),
            "n_open": int((probability >= 0.5).sum()),
        }
        return probability

    @torch.no_grad()
    def divergence(self, mask: Mask) -> Float[Tensor, " prompt"]:
        """KL of one circuit's prediction from the model's, on every prompt, batch by batch."""
        return torch.cat([self.circuits.divergence(mask, prompts)[0] for prompts in self.circuits.batches])

    def attrs(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """What the result says of how it was made."""
        return {
            **provenance(self.model, self.task),
            **said,
            "metric": "kl",
            "direction": "noise",
            "steps": self.steps,
            "learning_rate": self.learning_rate,
            "training_seed": self.seed,
            "unsigned": 1,
            **self._found,
            "seconds": time.perf_counter() - self._started,
        }
