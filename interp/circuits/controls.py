"""Is a circuit better than chance, is all of it in there, and is all of it needed?

`random_control` holds it against random circuits of the same size; `completeness` and `minimality` knock nodes out of
it (Wang et al. 2022, arXiv 2211.00593, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool
from numpy import ndarray

from interp.circuits.circuit import Circuit
from interp.circuits.evaluate import Ablation, measured
from interp.circuits.graph import EMBED, Graph
from interp.circuits.selection import greedy_edges
from interp.metrics import Metric
from interp.model import Model
from interp.patching.labels import provenance
from interp.tasks import Task


def random_control(
    model: Model,
    task: Task,
    circuit: Circuit,
    *,
    n_random: int = 50,
    ablation: Ablation = "resample",
    metric: str | Metric | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> xr.Dataset:
    """Faithfulness of a circuit beside that of random circuits with as many edges.

    Random circuits grow from the logits (`greedy_edges` on random scores), so that all of their edges lead to the
    answer: edges drawn anywhere would be dead, and easy to beat. Costs n_random runs a prompt.

    Args:
        model: the model.
        task: clean and corrupted prompts with answers.
        circuit: the circuit, by its mask; without positions.
        n_random: random circuits.
        ablation: as in `run_circuits`.
        metric: as in `activation_patching`.
        seed: of the random circuits.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset with `faithfulness` of the circuit and `random` [draw]; attr `p_value`: the share of circuits, this one
        among them, that are at least as near to 1.

    Raises:
        ValueError: for a circuit with positions or without edges, or less than one random circuit.
    """
    _check(circuit)
    _check_count("n_random", n_random)
    generator = np.random.default_rng(seed)
    draws = [
        greedy_edges(circuit.graph, generator.random(circuit.mask.shape), circuit.n_edges) for _ in range(n_random)
    ]
    values, said = measured(
        model, task, circuit.graph, [circuit.mask, *draws], ablation=ablation, metric=metric, progress=progress
    )
    own, *others = values["faithfulness"].mean(1).tolist()
    as_good = sum(abs(1 - other) <= abs(1 - own) for other in others)
    attrs = {**provenance(model, task), **said, "seed": seed, "p_value": (1 + as_good) / (1 + n_random)}
    return xr.Dataset({"faithfulness": own, "random": ("draw", others)}, attrs=attrs)


def completeness(
    model: Model,
    task: Task,
    circuit: Circuit,
    *,
    n_subsets: int = 20,
    share: float = 0.5,
    ablation: Ablation = "resample",
    metric: str | Metric | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> xr.Dataset:
    """Does the circuit break as the model breaks? Random sets of its nodes are knocked out of both.

    A complete circuit lies on the line circuit = model; where the model stands a loss better, it has a backup that the
    circuit lacks.

    Args:
        model: the model.
        task: as in `random_control`.
        circuit: as in `random_control`.
        n_subsets: random sets of the circuit's nodes.
        share: the chance of a node to be in a set.
        ablation: as in `run_circuits`.
        metric: as in `activation_patching`.
        seed: of the sets.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset over `subset`: `circuit` and `model`, the faithfulness of each without the set, and `n_nodes` of it;
        attr `incompleteness`: the mean of |circuit − model|.

    Raises:
        ValueError: as `random_control`; for a share outside 0..1.
    """
    _check(circuit)
    _check_count("n_subsets", n_subsets)
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}; it is the chance of a node to be in a set, 0..1")
    generator = np.random.default_rng(seed)
    nodes = np.array([name for name in circuit.nodes if name != EMBED])
    sets = [nodes[generator.random(len(nodes)) < share] for _ in range(n_subsets)]
    masks = [
        without_nodes(circuit.graph, mask, chosen.tolist())
        for chosen in sets
        for mask in (circuit.mask, circuit.graph.exists)
    ]
    values, said = measured(model, task, circuit.graph, masks, ablation=ablation, metric=metric, progress=progress)
    of_circuit, of_model = values["faithfulness"].mean(1).reshape(n_subsets, 2).T.numpy()
    attrs = {**provenance(model, task), **said, "seed": seed, "share": share}
    attrs["incompleteness"] = float(np.abs(of_circuit - of_model).mean())
    data = {name: ("subset", one) for name, one in (("circuit", of_circuit), ("model", of_model))}
    return xr.Dataset({**data, "n_nodes": ("subset", [len(one) for one in sets])}, attrs=attrs)


def minimality(
    model: Model,
    task: Task,
    circuit: Circuit,
    *,
    ablation: Ablation = "resample",
    metric: str | Metric | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """What each node of the circuit adds: faithfulness of the circuit less that without the node.

    Near 0 for a node that it could do without, as far as nodes do not stand in for each other (Wang et al. knock out
    further nodes with it, chosen by hand; `completeness` knocks out random sets).

    Args:
        model: the model.
        task: as in `random_control`.
        circuit: as in `random_control`.
        ablation: as in `run_circuits`.
        metric: as in `activation_patching`.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        [node], the nodes of the circuit but the embedding.

    Raises:
        ValueError: as `random_control`.
    """
    _check(circuit)
    nodes = [name for name in circuit.nodes if name != EMBED]
    masks = [circuit.mask, *(without_nodes(circuit.graph, circuit.mask, [name]) for name in nodes)]
    values, said = measured(model, task, circuit.graph, masks, ablation=ablation, metric=metric, progress=progress)
    own, *without = values["faithfulness"].mean(1).tolist()
    attrs: dict[str, Any] = {**provenance(model, task), **said, "faithfulness": own}
    return xr.DataArray(
        [own - one for one in without], dims=("node",), coords={"node": nodes}, name="minimality", attrs=attrs
    )


def without_nodes(
    graph: Graph, mask: Bool[ndarray, "writer reader"], nodes: Sequence[str]
) -> Bool[ndarray, "writer reader"]:
    """A circuit without some nodes: no edge leaves them. What they read plays no part then."""
    kept = mask.copy()
    kept[[graph.writer_index[name] for name in nodes]] = False
    return kept


def _check(circuit: Circuit) -> None:
    if circuit.has_positions:
        raise ValueError("this is for circuits without positions: give Circuit(graph, scores.sum(0), flat_mask)")
    if not circuit.n_edges:
        raise ValueError("the circuit has no edges")


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value}; it is at least 1")
