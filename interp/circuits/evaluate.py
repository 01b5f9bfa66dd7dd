"""How much of a behaviour a circuit carries: the model is run with every edge outside it cut.

`run_circuits` runs any edge sets, many at once. `evaluate` takes a method's scores at several sizes and
reports faithfulness, KL and accuracy at each, and the areas CPR and CMD of the MIB benchmark.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from interp.circuits.circuit import Circuit
from interp.circuits.graph import Graph
from interp.circuits.selection import top_edges
from interp.circuits.split_run import Reference, SplitRun
from interp.circuits.writers import HeadOutputs, writer_outputs
from interp.metrics import Metric
from interp.metrics import accuracy as is_right
from interp.model import Model
from interp.patching.activation import resolve_metric
from interp.patching.batching import batches
from interp.patching.labels import provenance
from interp.patching.progress import progress_bar
from interp.tasks import Task

Ablation = Literal["resample", "mean", "zero"]
ABLATIONS = ("resample", "mean", "zero")
MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all edges at which MIB evaluates circuits."""
RUN_BYTES = 2**30
"""Writers' outputs of all circuits that are held at once."""
RANKINGS = ("magnitude", "signed")

Read = Callable[[Float[Tensor, "row d_vocab"], Task], Float[Tensor, " row"]]


@torch.no_grad()
def run_circuits(
    model: Model,
    task: Task,
    graph: Graph,
    masks: Bool[ndarray, "circuit *pos writer reader"],
    read: Mapping[str, Read],
    *,
    ablation: Ablation = "resample",
    constants: Float[Tensor, "writer d_model"] | None = None,
    progress: bool | None = None,
    description: str = "circuits",
) -> dict[str, Float[Tensor, "circuit prompt"]]:
    """Run circuits on the clean prompts, what is outside them ablated, and read their logits.

    Costs about two forward passes for each circuit and prompt.

    Args:
        model: the model.
        task: clean and corrupted prompts.
        graph: the model's graph.
        masks: the edges of each circuit; with a position axis, those at each position of the prompts.
        read: by name, from last-position logits and the prompts they belong to, to one value a row.
        ablation: what edges outside a circuit carry: "resample", the corrupted run; "mean", the mean over clean prompts
            and positions; "zero".
        constants: what they carry instead, one vector a writer (`optimal_ablation`).
        progress: show a progress bar; None: in a terminal or notebook only.
        description: what the bar says.

    Returns:
        By name, values in the order of circuits and prompts.

    Raises:
        ValueError: for edges by position if prompts are of another length.
        FloatingPointError: if a value is NaN or infinite.
    """
    if ablation not in ABLATIONS:
        raise ValueError(f"ablation={ablation!r}; it is one of {', '.join(ABLATIONS)}")
    heads, groups = HeadOutputs(model), task.by_length()
    lengths = {len(group.clean_ids[0]) for group in groups}
    if masks.ndim == 4 and lengths != {masks.shape[1]}:
        others = ", ".join(map(str, sorted(lengths)))
        raise ValueError(f"these edges are for prompts of {masks.shape[1]} tokens; the task has prompts of {others}")
    if constants is None and ablation == "mean":
        constants = mean_outputs(model, groups, graph, heads)
    found: dict[str, list[Tensor]] = {name: [] for name in read}
    with progress_bar(len(masks) * len(task), description, "run", progress=progress) as bar:
        for group in groups:
            for prompts in _batches(model, group, graph):
                reference = reference_of(model, prompts, graph, heads, ablation, constants)
                run = SplitRun(model, graph, prompts.clean, reference, heads)
                values: dict[str, list[Tensor]] = {name: [] for name in read}
                for some in _circuit_chunks(len(masks), model, prompts, graph):
                    chosen = torch.from_numpy(masks[some]).to(model.device, torch.float32)
                    for logits in run.logits(chosen):
                        for name, reader in read.items():
                            values[name].append(reader(logits, prompts).detach().cpu())
                        bar.update(len(prompts))
                for name, several in values.items():
                    found[name].append(torch.stack(several))
    order = torch.cat([group.index for group in groups]).argsort()
    results = {name: torch.cat(parts, dim=1)[:, order] for name, parts in found.items()}
    for name, one in results.items():
        if not bool(one.isfinite().all()):
            raise FloatingPointError(f"{name} of a circuit is NaN or infinite: check metric, weights, dtype")
    return results


def _batches(model: Model, group: Task, graph: Graph) -> list[Task]:
    length = len(group.clean_ids[0])
    at_once = max(1, RUN_BYTES // 2 // _bytes_a_prompt(model, graph, length))
    return [group[rows] for rows in batches(len(group), length, min(at_once, len(group)))]


def _circuit_chunks(n_circuits: int, model: Model, prompts: Task, graph: Graph) -> list[slice]:
    a_circuit = _bytes_a_prompt(model, graph, len(prompts.clean_ids[0])) * len(prompts)
    step = max(1, RUN_BYTES // a_circuit)
    return [slice(first, first + step) for first in range(0, n_circuits, step)]


def _bytes_a_prompt(model: Model, graph: Graph, length: int) -> int:
    return len(graph.writers) * length * model.d_model * 4


def reference_of(
    model: Model,
    prompts: Task,
    graph: Graph,
    heads: HeadOutputs,
    ablation: Ablation,
    constants: Float[Tensor, "writer d_model"] | None,
) -> Reference:
    """What edges outside a circuit carry on these prompts."""
    if ablation == "resample" and constants is None:
        return Reference(writer_outputs(model, graph, prompts.corrupted, heads)[0])
    if constants is None:
        constants = torch.zeros(len(graph.writers), model.d_model, device=model.device)
    return Reference(constants[:, None, None])


def mean_outputs(
    model: Model, groups: Sequence[Task], graph: Graph, heads: HeadOutputs
) -> Float[Tensor, "writer d_model"]:
    """Mean output of every writer over all clean prompts and positions."""
    total, count = torch.zeros(len(graph.writers), model.d_model, device=model.device), 0
    for group in groups:
        for prompts in _batches(model, group, graph):
            total += writer_outputs(model, graph, prompts.clean, heads)[0].sum((1, 2))
            count += prompts.clean.numel()
    return total / count


def evaluate(
    model: Model,
    task: Task,
    circuit: Circuit,
    *,
    sizes: Sequence[float] = MIB_SIZES,
    ablation: Ablation = "resample",
    constants: Float[Tensor, "writer d_model"] | None = None,
    metric: str | Metric | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Faithfulness of a circuit's scores at several sizes, by magnitude and by signed score.

    faithfulness = (m(circuit) − m(∅)) / (m(model) − m(∅)), of mean metrics m; ∅ has no edge. Edges are the best by
    score, dead ends included. CPR is the area under the curve by signed score, CMD the area between the curve by
    magnitude and 1, both over sizes by the trapezoid rule (so that a perfect CPR is the largest less the smallest
    size).

    Args:
        model: the model.
        task: clean and corrupted prompts with answers; others than the circuit was found on, if it is to generalise.
        circuit: its scores make the curve; its mask is measured beside it.
        sizes: shares of all edges; with positions, of all edges at all positions.
        ablation: as in `run_circuits`.
        constants: as in `run_circuits`.
        metric: as in `activation_patching`.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Dataset over [ranking, size]: `faithfulness`, `metric`, `kl` (of the circuit's prediction from the model's,
        nats), `accuracy` and `n_edges`; the same of the circuit's own edges as `circuit_faithfulness` and so on, if it
        has any; attrs `cpr` and `cmd` (NaN of one size: there is no area).

    Raises:
        ValueError: for sizes outside 0..1, or if model and empty circuit have the same metric.

    Source: Mueller et al. 2025, MIB (arXiv 2504.13151).
    """
    started = time.perf_counter()
    shares = sorted(sizes)
    if not shares or not shares[0] >= 0 or not shares[-1] <= 1:
        raise ValueError(f"sizes={list(sizes)}; they are shares of all edges, 0..1")
    graph = circuit.graph
    n_scored = int((~np.isnan(circuit.scores)).sum())
    counts = [min(int(share * graph.exists.sum() * _n_positions(circuit)), n_scored) for share in shares]
    masks = [
        top_edges(graph, circuit.scores, count, signed=ranking == "signed") for ranking in RANKINGS for count in counts
    ]
    own = [circuit.mask] if circuit.n_edges else []
    values, said = measured(
        model, task, graph, [*masks, *own], ablation=ablation, constants=constants, metric=metric, progress=progress
    )
    shape = (len(RANKINGS), len(shares))
    means = {name: one.mean(1).numpy() for name, one in values.items()}
    data: dict[str, Any] = {
        name: (("ranking", "size"), one[: len(masks)].reshape(shape)) for name, one in means.items()
    }
    if own:
        data |= {f"circuit_{name}": float(one[-1]) for name, one in means.items()}
    data["n_edges"] = (("ranking", "size"), np.tile(counts, (len(RANKINGS), 1)))
    curve = xr.Dataset(data, coords={"ranking": list(RANKINGS), "size": shares})
    cpr, cmd = areas(curve["faithfulness"])
    attrs = {**circuit.attrs, **provenance(model, task), **said, "cpr": cpr, "cmd": cmd}
    return curve.assign_attrs({**attrs, "seconds": time.perf_counter() - started})


def areas(faithfulness: xr.DataArray) -> tuple[float, float]:
    """CPR and CMD of a curve [ranking, size]; NaN of one size."""
    signed, magnitude = (faithfulness.sel(ranking=name) for name in ("signed", "magnitude"))
    size = faithfulness["size"].values
    if size[0] == size[-1]:
        return np.nan, np.nan
    return float(np.trapezoid(signed, size)), float(np.trapezoid(abs(1 - magnitude), size))


def measured(
    model: Model,
    task: Task,
    graph: Graph,
    masks: Sequence[Bool[ndarray, "*pos writer reader"]],
    *,
    ablation: Ablation = "resample",
    constants: Float[Tensor, "writer d_model"] | None = None,
    metric: str | Metric | None = None,
    progress: bool | None = None,
) -> tuple[dict[str, Float[Tensor, "circuit prompt"]], dict[str, Any]]:
    """Metric, faithfulness, KL from the model's prediction and accuracy of edge sets, prompt by prompt.

    Faithfulness divides by the gap of means, so that its mean over prompts is that of the circuit.

    Returns:
        (values by name, attrs that say how they were measured).

    Raises:
        ValueError: if model and empty circuit have the same mean metric.
    """
    name, metric_fn = resolve_metric(metric, task)
    prediction = {tuple(ids): row for ids, row in zip(task.clean_ids, _log_probabilities(model, task), strict=True)}

    def kl(logits: Tensor, prompts: Task) -> Tensor:
        full = torch.stack([prediction[ids] for ids in prompts.clean_ids])
        own = logits.float().log_softmax(-1).cpu()
        return (full.exp() * (full - own)).sum(-1)

    def on_answers(of: Metric) -> Read:
        return lambda logits, prompts: of(logits, prompts.answers.to(logits.device), prompts.wrong.to(logits.device))

    empty = np.zeros_like(masks[0])
    full = np.broadcast_to(graph.exists, empty.shape)
    read = {"metric": on_answers(metric_fn), "kl": kl, "accuracy": on_answers(is_right)}
    values = run_circuits(
        model,
        task,
        graph,
        np.stack([full, empty, *masks]),
        read,
        ablation=ablation,
        constants=constants,
        progress=progress,
    )
    whole, nothing = values["metric"][:2].double().mean(1)
    if whole == nothing:
        raise ValueError(f"the metric {name!r} is the same for the model and the empty circuit: no behaviour")
    kept = {key: one[2:] for key, one in values.items()}
    kept["faithfulness"] = (kept["metric"].double() - nothing) / (whole - nothing)
    said = {
        "metric": name,
        "ablation": "constants" if constants is not None else ablation,
        "metric_model": float(whole),
        "metric_empty": float(nothing),
    }
    return kept, said


@torch.no_grad()
def _log_probabilities(model: Model, task: Task) -> Float[Tensor, "prompt d_vocab"]:
    groups = task.by_length()
    rows = [
        model(group.clean[some], logits_to_keep=1)[:, -1].float().log_softmax(-1).cpu()
        for group in groups
        for some in batches(len(group), len(group.clean_ids[0]), None)
    ]
    return torch.cat(rows)[torch.cat([group.index for group in groups]).argsort()]


def _n_positions(circuit: Circuit) -> int:
    return len(circuit.mask) if circuit.has_positions else 1
