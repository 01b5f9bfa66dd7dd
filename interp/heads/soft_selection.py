"""Which heads carry a task: learn how much of each to replace by its mean output over few-shot prompts.

1. t[layer, head] is the mean z of the head at the last token of prompts that show the task.
2. On prompts that do not show it, z at the last token becomes (1 − α) z + α t, with one α a head between 0 and 1.
3. α is learned so that the answer becomes likely. Heads that carry the task go to 1, those that would disturb it to 0.

The map of α is a measure of which heads matter to the task; with t it also does the task, without examples.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.heads.rows import token_groups
from interp.metrics import log_prob
from interp.model import Model, Site
from interp.model.hooks import Run, Tap, TapFn, tapped
from interp.patching.batching import batches
from interp.patching.labels import model_provenance, provenance
from interp.patching.progress import progress_bar
from interp.tasks import Task

HELD_OUT = 0.2
"""Share of the prompts that is validated on where no validation task is given."""


def mean_head_outputs(
    model: Model,
    prompts: Task | Int[Tensor, "prompt pos"],
    *,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> xr.DataArray:
    """Mean z of every head at the last token of prompts, such as ones with examples of a task. One forward pass each.

    Args:
        model: the model.
        prompts: a task (its clean prompts, of any lengths) or token ids.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        DataArray [layer, head, d_head] in float32 at least.
    """
    sites = [Site("z", layer) for layer in range(model.n_layers)]
    groups = token_groups(prompts)
    n_prompts = sum(map(len, groups))
    total = torch.zeros(model.n_layers, model.n_heads, model.d_head, dtype=torch.float64)
    with progress_bar(n_prompts, "mean head outputs", "prompt", progress=progress) as bar:
        for tokens in groups:
            for rows in batches(len(tokens), tokens.shape[1], batch_size):
                _, cache = model.run_with_cache(tokens[rows], sites, positions=-1, logits_to_keep=1)
                total += torch.stack([cache[site].double().sum((0, 1)).cpu() for site in sites])
                bar.update(len(tokens[rows]))
    about = provenance(model, prompts) if isinstance(prompts, Task) else model_provenance(model)
    return xr.DataArray(
        (total / n_prompts).to(torch.promote_types(model.dtype, torch.float32)).numpy(),
        dims=("layer", "head", "d_head"),
        coords={"layer": range(model.n_layers), "head": range(model.n_heads)},
        name="z",
        attrs={**about, "method": "mean_head_outputs", "n_prompts": n_prompts},
    )


@contextmanager
def injected(
    model: Model,
    t: xr.DataArray | Float[Tensor, "layer head d_head"],
    alpha: xr.DataArray | Float[Tensor, "layer head"],
) -> Iterator[None]:
    """Replace z at the last prompt token by (1 − α) z + α t, in every run inside the context, in this thread.

    In `generate`, that is the token before the first new one: decoded tokens are left alone, and see it through the KV
    cache. Without a cache each step would count as a prompt of its own, so keep it on. The prompts of a batch may be
    padded on the left.

    Args:
        model: the model.
        t: what to inject, as `mean_head_outputs` gives it.
        alpha: how much of it, 0 = nothing, 1 = all, as `soft_selection` gives it.

    Raises:
        ValueError: for shapes that do not fit the model, or α outside 0..1.
    """
    shares = _checked(model, alpha, "alpha", (model.n_layers, model.n_heads))
    if bool(((shares < 0) | (shares > 1)).any()):
        raise ValueError(f"alpha runs from {float(shares.min()):.3g} to {float(shares.max()):.3g}; it lies in 0..1")
    with tapped(model.anatomy, _injection(_means(model, t), shares)):
        yield


def soft_selection(
    model: Model,
    t: xr.DataArray | Float[Tensor, "layer head d_head"],
    task: Task,
    *,
    validation: Task | None = None,
    steps: int = 400,
    learning_rate: float = 0.2,
    batch_size: int = 1,
    validate_every: int = 50,
    seed: int = 0,
    progress: bool | None = None,
) -> xr.DataArray:
    """Learn how much of each head's mean output to inject so that the answers become likely.

    α is the logistic function of θ, and θ begins at 0 (α = 0.5). Adam lowers −log of the right answers' total
    probability at the last token. Of the checkpoints, the one with the least loss on held-out prompts is returned, the
    beginning among them. Costs a forward and a backward pass a step, and one forward pass over the held-out prompts a
    checkpoint; weights get no gradient.

    Args:
        model: the model.
        t: what to inject, as `mean_head_outputs` gives it.
        task: prompts that do not show the task by examples (the clean ones), with the first token of their answers.
        validation: prompts to choose the checkpoint by. None: a fifth of the task, which is then not trained on.
        steps: of Adam.
        learning_rate: of Adam.
        batch_size: prompts a step, drawn with replacement.
        validate_every: steps from checkpoint to checkpoint; the last step is one too.
        seed: of the draws.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        α [layer, head]. Attrs say which `step` it is of and list `validation_loss` of every checkpoint; `loss_before`
        and `loss_after` are those of α = 0 and of the α returned, on the held-out prompts.

    Raises:
        ValueError: for shapes that do not fit, a number below 1, or a task of one prompt without a validation task.

    Source: SITE (arXiv 2507.20906), whose released code keeps the last checkpoint. Checked on a model with planted
    heads, and against finite differences, in tests/heads/test_soft_selection.py.
    """
    started = time.perf_counter()
    numbers = {
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "validate_every": validate_every,
    }
    for what, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{what}={value}; it is greater than 0")
    means = _means(model, t)
    generator = torch.Generator().manual_seed(seed)
    training, held_out = (task, validation) if validation is not None else _split(task, generator)
    theta = torch.zeros(means.shape[:2], dtype=means.dtype, device=means.device, requires_grad=True)
    optimiser = torch.optim.Adam([theta], lr=learning_rate)
    checkpoints = {0: theta.detach().sigmoid()}
    losses = {0: _held_out_loss(model, means, checkpoints[0], held_out)}
    with progress_bar(steps, "soft head selection", "step", progress=progress) as bar:
        for step in range(1, steps + 1):
            rows = torch.randint(len(training), (batch_size,), generator=generator).tolist()
            (theta.grad,) = torch.autograd.grad(injection_loss(model, means, theta, training[rows]), [theta])
            optimiser.step()
            if step % validate_every == 0 or step == steps:
                checkpoints[step] = theta.detach().sigmoid()
                losses[step] = _held_out_loss(model, means, checkpoints[step], held_out)
                bar.set_postfix(validation=f"{losses[step]:.4f}")
            bar.update(1)
    best = min(losses, key=losses.__getitem__)
    return xr.DataArray(
        checkpoints[best].cpu().numpy(),
        dims=("layer", "head"),
        coords={"layer": range(model.n_layers), "head": range(model.n_heads)},
        name="alpha",
        attrs={
            **provenance(model, task),
            **numbers,
            "method": "soft_selection",
            "training_seed": seed,
            "step": best,
            "n_held_out": len(held_out),
            "validation_loss": list(losses.values()),
            "loss_before": _held_out_loss(model, means, torch.zeros_like(checkpoints[best]), held_out),
            "loss_after": losses[best],
            "seconds": time.perf_counter() - started,
        },
    )


def injection_loss(
    model: Model, means: Float[Tensor, "layer head d_head"], theta: Float[Tensor, "layer head"], task: Task
) -> Float[Tensor, ""]:
    """−log of the right answers' total probability, averaged over prompts; differentiable in θ."""
    total = torch.zeros((), device=means.device)
    with torch.enable_grad(), tapped(model.anatomy, _injection(means, theta.sigmoid())):
        for group in task.by_length():
            logits, _ = model.run_on_path(group.clean, Site("z", 0), logits_to_keep=1)
            total = total + _losses(logits[:, -1], group).sum()
        return total / len(task)


@torch.no_grad()
def _held_out_loss(model: Model, means: Tensor, alpha: Tensor, task: Task) -> float:
    found = []
    with tapped(model.anatomy, _injection(means, alpha)):
        for group in task.by_length():
            for rows in batches(len(group), group.clean.shape[1], None):
                found.append(_losses(model.last_logits(group.clean[rows]), group[rows]))
    return float(torch.cat(found).mean())


def _losses(logits: Float[Tensor, "prompt d_vocab"], task: Task) -> Float[Tensor, " prompt"]:
    return -log_prob(logits, task.answers.to(logits.device), task.wrong.to(logits.device))


def _split(task: Task, generator: torch.Generator) -> tuple[Task, Task]:
    if len(task) < 2:
        raise ValueError("a task of one prompt leaves none to validate on; give more prompts, or a validation task")
    order = torch.randperm(len(task), generator=generator).tolist()
    n_held_out = max(1, round(HELD_OUT * len(task)))
    return task[order[n_held_out:]], task[order[:n_held_out]]


def _injection(means: Tensor, alpha: Tensor) -> list[Tap]:
    """Taps that inject in every layer, at the last column of a pass that begins a prompt."""

    def at(layer: int) -> TapFn:
        def inject(z: Tensor, run: Run) -> Tensor | None:
            if run.n_past:
                return None
            share, mean = alpha[layer, :, None].to(z.device), means[layer].to(z.device)
            new = z.clone()
            new[:, -1] = ((1 - share) * z[:, -1] + share * mean).to(z.dtype)
            return new

        return inject

    return [Tap(Site("z", layer), at(layer)) for layer in range(len(means))]


def _means(model: Model, t: xr.DataArray | Tensor) -> Float[Tensor, "layer head d_head"]:
    return _checked(model, t, "t", (model.n_layers, model.n_heads, model.d_head))


def _checked(model: Model, values: xr.DataArray | Tensor, what: str, shape: Sequence[int]) -> Tensor:
    """Values as a tensor on the model's device, in float32 at least."""
    found = torch.as_tensor(values.values) if isinstance(values, xr.DataArray) else values.detach()
    if tuple(found.shape) != tuple(shape):
        raise ValueError(f"{what} has the shape {tuple(found.shape)}; that of this model is {tuple(shape)}")
    return found.to(model.device, torch.promote_types(model.dtype, torch.float32))
