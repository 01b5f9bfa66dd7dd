"""Effects of SAE features, and of what SAEs leave out, on a behaviour: the nodes of a feature circuit.

At the site of an SAE the activation is a sum, x = Σ f_i W_dec_i + b_dec + error. Each feature and the error of each
position is a node. What a node would lose, if it were as in another run, is estimated to first order:

1. run the corrupted prompts, and note features and errors;
2. run the clean prompts with a backward pass, which gives the gradient g of the metric at each site: plainly, under
   relevance rules (RelP), or averaged on the way to the corrupted run, one site at a time (integrated gradients);
3. the effect of a feature is (its clean − corrupted activation) · (W_dec_i · g); that of an error the product of its
   difference and g, summed over the site's width.

Effects of all nodes of a position add up to attribution patching of the site. Edges: `interp.saes.feature_edges`.

Source: Marks et al. 2024 (arXiv 2403.19647), whose effects have the opposite sign; RelP: arXiv 2508.21258.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.metrics import Metric
from interp.model import Model, Site
from interp.model.hooks import Tap, tapped
from interp.patching.activation import normalised_shares
from interp.patching.batching import batches
from interp.patching.estimate import Request, request, widened
from interp.patching.integrated import Rule, rule_points
from interp.patching.labels import labelled
from interp.patching.progress import progress_bar
from interp.patching.rules.relevance import prepared_rules, rules_label
from interp.saes.sae import SAE, from_rows, to_rows
from interp.saes.splice import sites_of, spliced
from interp.tasks import Task

Method = Literal["attribution", "ig", "relp"]
METHODS: tuple[Method, ...] = ("attribution", "ig", "relp")
Patch = Literal["corrupted", "zero"]
Through = Literal["site", "features"]
ERROR = -1
"""The `feature` of an error node."""


class Placed(NamedTuple):
    """An SAE with the sites that it reads and stands for in a model."""

    sae: SAE
    source: Site
    target: Site

    @property
    def n_nodes(self) -> int:
        """Its features, and its error."""
        return self.sae.d_sae + 1


class NodeValues(NamedTuple):
    """What the nodes of one SAE carry in a run."""

    features: Float[Tensor, "batch pos d_sae"]
    error: Float[Tensor, "batch pos d_out"]


class Change(NamedTuple):
    """What effects of the nodes of one SAE are products of."""

    one: Placed
    lost: NodeValues
    """Values in the clean run, minus those in the patch."""
    gradient: Float[Tensor, "batch pos d_out"]
    """Of each prompt's metric, at the site that the SAE stands for."""


@dataclass(frozen=True)
class Estimate:
    """One call's choices, checked; made by `prepared_estimate`."""

    asked: Request
    placed: tuple[Placed, ...]
    patch: Patch
    by_position: bool
    points: Sequence[tuple[float, float]] | None
    """Places and weights of integrated gradients; None: one gradient, at the clean run."""
    within: Callable[[], AbstractContextManager[Any]]
    """Makes the context of the passes that give gradients."""
    said: Mapping[str, Any]
    """The choices, for a result's attrs."""

    @property
    def sites(self) -> list[Site]:
        """Every site that an SAE reads or stands for, once."""
        return list(dict.fromkeys(site for one in self.placed for site in (one.source, one.target)))


def feature_effects(
    model: Model,
    task: Task,
    saes: SAE | Sequence[SAE],
    *,
    method: Method = "attribution",
    patch: Patch = "corrupted",
    by_position: bool = True,
    through: Through = "site",
    steps: int = 10,
    rule: Rule = "midpoint",
    rules: str | Sequence[str] = "relp",
    metric: str | Metric | None = None,
    normalised: bool = False,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """What the metric would lose if a feature, or an SAE's error, were as in the corrupted run; mean over prompts.

    Costs two forward passes and one backward pass for "attribution" and "relp", whatever the number of SAEs; for "ig"
    two forward passes, and `steps` forward and backward passes for each SAE. Holds batch x position x d_sae floats of
    one SAE several times.

    Args:
        model: the model; parallel attention and MLP make no difference to nodes.
        task: clean and corrupted prompts with answers.
        saes: one or several SAEs or transcoders, of different sites.
        method: where gradients come from. "attribution": the clean run. "ig": averaged on the straight way from the
            clean to the patched activation, one site at a time, all others recomputed. "relp": the clean run under
            relevance rules.
        patch: what nodes are compared with: the corrupted run, or "zero".
        by_position: keep positions apart; else effects are summed over them, each prompt's own sum with its sign.
        through: how a gradient passes an SAE on its way to earlier ones. "site": unchanged, as published; its features
            and its error carry it together. "features": through decoder and encoder only, which are linear for the set
            of active features, while the error counts as a constant.
        steps: points of integrated gradients.
        rule: where they lie, as in `interp.patching.integrated_gradients`; as published, "left".
        rules: relevance rules of "relp", as in `interp.patching.relevance_patching`.
        metric: name in `interp.metrics.METRICS` or a function, with a gradient; the task's own by default.
        normalised: divide by the mean over prompts of metric(clean) − metric(corrupted). By default effects are in the
            unit of the metric, as published thresholds are.
        batch_size: prompts a pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        Array over [position, node] or [node], positive where a node supports the behaviour. Beside `node` stand `site`
        (which the SAE reads) and `feature`; the last node of each site is its error, feature −1. Attrs
        `forward_passes` and `backward_passes` count what each prompt cost. The skip connection of a skip transcoder
        belongs to no node.

    Raises:
        ValueError: for an unknown choice, SAEs that share a site or do not fit the model, positions over prompts of
            several lengths, or a metric without a gradient.
        FloatingPointError: if a run or an effect is NaN or infinite.

    Source: Marks et al. 2024 (arXiv 2403.19647). Checked in tests/saes/test_feature_effects.py against one run a node.
    """
    started = time.perf_counter()
    chosen = prepared_estimate(
        model,
        task,
        saes,
        method=method,
        patch=patch,
        by_position=by_position,
        through=through,
        steps=steps,
        rule=rule,
        rules=rules,
        metric=metric,
        normalised=normalised,
        batch_size=batch_size,
        progress=progress,
    )
    effects, clean, corrupted = _mean_effects(chosen, method)
    if normalised:
        gap = clean.mean(0, keepdim=True), corrupted.mean(0, keepdim=True)
        effects = normalised_shares(effects[None], *gap, chosen.asked.metric_name)[0]
    placed = chosen.placed
    n_ways = len(placed) * steps if method == "ig" else 0
    attrs = {
        **chosen.said,
        "metric_clean": float(clean.mean()),
        "metric_corrupted": float(corrupted.mean()),
        "forward_passes": 2 + n_ways,
        "backward_passes": n_ways or 1,
        "seconds": time.perf_counter() - started,
    }
    dims = ("position", "node") if by_position else ("node",)
    named = labelled(effects, dims, model, task, attrs, sites=[one.target for one in placed])
    return named.assign_coords(
        site=("node", [str(one.source) for one in placed for _ in range(one.n_nodes)]),
        feature=("node", [feature for one in placed for feature in (*range(one.sae.d_sae), ERROR)]),
    )


def prepared_estimate(
    model: Model,
    task: Task,
    saes: SAE | Sequence[SAE],
    *,
    method: Method,
    patch: Patch,
    by_position: bool,
    through: Through,
    steps: int,
    rule: Rule,
    rules: str | Sequence[str],
    metric: str | Metric | None,
    normalised: bool,
    batch_size: int | None,
    progress: bool | None,
) -> Estimate:
    """The choices of one call, as in `feature_effects`, checked against the model and the task; ValueError as there."""
    check_choice("method", method, METHODS)
    check_choice("patch", patch, ("corrupted", "zero"))
    check_choice("through", through, ("site", "features"))
    placed = place(model, saes)
    asked = request(
        model,
        task,
        sites=[one.target for one in placed],
        by=("position",) if by_position else (),
        direction="noise",
        metric=metric,
        normalised=normalised,
        per_prompt=False,
        batch_size=batch_size,
        progress=progress,
    )
    said = {
        "method": method,
        "patch": patch,
        "through": through,
        "metric": asked.metric_name,
        "normalised": int(normalised),
        **({"steps": steps, "rule": rule} if method == "ig" else {}),
        **({"rules": rules_label(rules)} if method == "relp" else {}),
    }
    points = rule_points(steps, rule) if method == "ig" else None
    within = _context(model, placed, prepared_rules(model, rules) if method == "relp" else nullcontext, through)
    return Estimate(asked, placed, patch, by_position, points, within, said)


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raise a ValueError for a value that is not one of the known ones."""
    if value not in known:
        raise ValueError(f"{name}={value!r}; it is one of {', '.join(known)}")


def place(model: Model, saes: SAE | Sequence[SAE]) -> tuple[Placed, ...]:
    """SAEs with their sites in this model, in the order of the model.

    Raises:
        ValueError: if there are none, one does not fit the model, or two share a site.
    """
    chosen = [saes] if isinstance(saes, SAE) else list(saes)
    if not chosen:
        raise ValueError("no SAEs were given")
    placed = [Placed(sae, *sites_of(model, sae)) for sae in chosen]
    for sites in ([one.source for one in placed], [one.target for one in placed]):
        for site in sites:
            if sites.count(site) > 1:
                raise ValueError(f"two SAEs share the site {site}; give one for each site")
    return tuple(sorted(placed, key=lambda one: model.sites.index(one.target)))


@torch.no_grad()
def node_values(one: Placed, activations: Mapping[str, Tensor]) -> NodeValues:
    """Features and error of an SAE on the activations of a run."""
    sae, x = one.sae, to_rows(one.source, activations[one.source]).to(one.sae.dtype)
    features = sae.encode(x)
    target = to_rows(one.target, activations[one.target]).to(sae.dtype)
    return NodeValues(features, target - sae.decode(features, x))


def _context(
    model: Model, placed: Sequence[Placed], rules: Callable[[], AbstractContextManager[Any]], through: Through
) -> Callable[[], AbstractContextManager[Any]]:
    """What makes the context of passes that give gradients."""

    @contextmanager
    def within() -> Any:
        with ExitStack() as stack:
            stack.enter_context(rules())
            if through == "features":
                stack.enter_context(spliced(model, [one.sae for one in placed], keep_error=True))
            yield

    return within


def _mean_effects(estimate: Estimate, method: str) -> tuple[Tensor, Float[Tensor, " prompt"], Float[Tensor, " prompt"]]:
    """(effects [*pos, node], metric of the clean and of the corrupted run, both by length of the prompt)."""
    asked = estimate.asked
    total: Tensor | None = None
    metrics: list[tuple[Tensor, Tensor]] = []
    with progress_bar(len(asked.task), f"feature effects ({method})", "prompt", progress=asked.progress) as bar:
        for group in asked.task.by_length():
            for rows in batches(len(group), len(group.clean_ids[0]), asked.batch_size):
                effects, clean, corrupted = _batch_effects(estimate, group[rows])
                total = effects if total is None else total + effects
                metrics.append((clean.cpu(), corrupted.cpu()))
                bar.update(len(clean))
    assert total is not None  # a task has a prompt
    if not bool(total.isfinite().all()):
        raise FloatingPointError("feature effects are NaN or infinite: check metric, SAE and model weights, dtype")
    clean, corrupted = (torch.cat(values) for values in zip(*metrics, strict=True))
    return total / len(asked.task), clean, corrupted


def _batch_effects(
    estimate: Estimate, prompts: Task
) -> tuple[Tensor, Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """(effects summed over prompts [*pos, node] on the CPU, metric of both runs)."""
    found, clean, corrupted = changes(estimate, prompts, estimate.placed)
    effects = [
        products(one.sae.W_dec, lost, gradient, by_position=estimate.by_position) for one, lost, gradient in found
    ]
    return torch.cat(effects, dim=-1), clean, corrupted


def changes(
    estimate: Estimate, prompts: Task, placed: Sequence[Placed]
) -> tuple[Iterator[Change], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """(what effects are made of, for each of these SAEs; metric of the clean and of the corrupted run) of one batch."""
    asked = estimate.asked
    logits, others = asked.model.run_with_cache(prompts.corrupted, estimate.sites, logits_to_keep=1)
    corrupted = asked.score(logits[:, -1], prompts)
    if estimate.points is None:
        clean, activations, gradients = _backward(estimate, prompts, estimate.sites)
    else:
        logits, activations = asked.model.run_with_cache(prompts.clean, estimate.sites, logits_to_keep=1)
        clean, gradients = asked.score(logits[:, -1], prompts), {}

    def of(one: Placed) -> Change:
        lost = node_values(one, activations)
        if estimate.patch == "corrupted":
            there = node_values(one, others)
            lost = NodeValues(lost.features - there.features, lost.error - there.error)
        if estimate.points is not None:
            return Change(one, lost, _averaged_gradient(estimate, prompts, one, activations[one.target], lost))
        return Change(one, lost, widened(to_rows(one.target, gradients[one.target])))

    return map(of, placed), clean, corrupted


@torch.no_grad()
def products(
    decoder: Float[Tensor, "feature d_out"],
    lost: NodeValues,
    gradient: Float[Tensor, "batch pos d_out"],
    *,
    by_position: bool,
) -> Float[Tensor, "*pos node"]:
    """What each feature and the error lose times the gradient, summed over prompts; on the CPU.

    Args:
        decoder: the decoder's rows of these features.
        lost: their difference, and that of the error.
        gradient: at the site.
        by_position: keep positions apart, or sum over them.
    """
    wide = torch.promote_types(gradient.dtype, decoder.dtype)
    gradient = gradient.to(wide)
    features = lost.features * (gradient @ decoder.to(wide).T)
    error = (lost.error * gradient).sum(-1, keepdim=True)
    summed = [0] if by_position else [0, 1]
    return torch.cat([features.sum(summed), error.sum(summed)], dim=-1).cpu()


@torch.no_grad()
def _averaged_gradient(
    estimate: Estimate, prompts: Task, one: Placed, clean: Tensor, lost: NodeValues
) -> Float[Tensor, "batch pos d_out"]:
    """Mean gradient on the way that takes the nodes of one SAE from the clean run to the patch."""
    rows = to_rows(one.target, clean)
    change = lost.features @ one.sae.W_dec + lost.error
    total = torch.zeros_like(change)
    for place_on_way, weight in estimate.points or ():
        between = from_rows(one.target, (rows - place_on_way * change).to(rows.dtype), clean)
        _, _, gradients = _backward(estimate, prompts, [one.target], Tap(one.target, lambda *_, value=between: value))
        total.add_(widened(to_rows(one.target, gradients[one.target])), alpha=weight)
    return total


def _backward(
    estimate: Estimate, prompts: Task, sites: Sequence[Site], *taps: Tap
) -> tuple[Float[Tensor, " batch"], Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Metric, activations and gradients of the clean prompts, with taps in force before they are read."""
    asked = estimate.asked
    with estimate.within(), tapped(asked.model.anatomy, taps):
        return asked.model.run_with_gradients(
            prompts.clean, lambda logits: asked.score(logits[:, -1], prompts), sites, logits_to_keep=1
        )
