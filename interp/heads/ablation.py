"""Take out one head at a time and see what becomes of the prediction: the runs behind every importance measure.

Each head's z (its output before W_O) is replaced at all positions of the clean prompt; one run gives both the change of
the metric and the divergence of the whole next-token distribution, so that measures of the two kinds share runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.heads.effects import in_prompt_order
from interp.metrics import Metric, kl_divergence
from interp.model import Edit, Model, Site
from interp.patching import Variant, sweep
from interp.patching.activation import Ablation
from interp.patching.batching import batches, mean_activations
from interp.tasks import Task

ABLATIONS: tuple[Ablation, ...] = ("zero", "mean", "resample")


@dataclass(frozen=True)
class HeadAblation:
    """What ablating each head did, prompt by prompt, in the order of the task."""

    effect: Float[Tensor, "prompt layer head"]
    """metric(clean) − metric(ablated): positive = the head supports the behaviour."""
    kl: Float[Tensor, "prompt layer head"]
    """KL(clean ‖ ablated) of the next-token distribution at the last position, in nats."""
    clean: Float[Tensor, " prompt"]
    """The metric of the clean run."""


def ablate_heads(
    model: Model,
    task: Task,
    ablation: Ablation,
    metric: Metric,
    *,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> HeadAblation:
    """Run every clean prompt once for every head, with that head ablated.

    Costs layers × heads runs of the sweep engine a prompt, each from its head's layer (for resample also from the first
    token that differs) on; holds the distribution of each clean prompt and, for resample, its corrupted z.

    Args:
        model: the model.
        task: clean prompts; the corrupted ones are the source of "resample".
        ablation: z becomes 0 ("zero"), its mean over prompts and positions of the clean runs ("mean"), or that of the
            corrupted prompt at the same position ("resample").
        metric: from last-position logits, answers and wrong answers to one value a prompt.
        batch_size: variants at once; by default what memory allows.
        progress: show a progress bar; None: in a terminal or notebook only.

    Raises:
        ValueError: for an unknown ablation.
    """
    if ablation not in ABLATIONS:
        raise ValueError(f"ablation={ablation!r}; it is one of {', '.join(ABLATIONS)}")
    groups = task.by_length()
    sites = model.site_names("z")
    mean = mean_activations(model, groups, sites, batch_size=batch_size) if ablation == "mean" else {}
    zero = torch.zeros(1, dtype=model.dtype, device=model.device)
    parts = []
    for group in groups:
        source = head_outputs(model, group.corrupted, batch_size) if ablation == "resample" else []

        shape = (group.clean.shape[1], model.n_heads, model.d_head)

        def replacement(
            prompt: int, layer: int, source: list[Tensor] = source, shape: tuple[int, int, int] = shape
        ) -> Tensor:
            constant = zero if ablation == "zero" else mean.get(sites[layer])
            return source[layer][prompt] if constant is None else constant.expand(shape)

        variants = _variants(model, len(group), replacement)
        clean_logits = torch.cat(
            [model.last_logits(group.clean[rows]) for rows in batches(len(group), group.clean.shape[1], batch_size)]
        )
        read = _reader(metric, group, clean_logits)
        clean = read(clean_logits, torch.arange(len(group)))[:, 0].cpu()
        values = sweep(
            model,
            group.clean,
            variants,
            read,
            batch_size=batch_size,
            progress=progress,
            description=f"{ablation} ablation of heads",
        ).cpu()
        values = values.reshape(len(group), model.n_layers, model.n_heads, 2)
        parts.append(HeadAblation(clean[:, None, None] - values[..., 0], values[..., 1], clean))
    return HeadAblation(
        in_prompt_order(groups, [part.effect for part in parts]),
        in_prompt_order(groups, [part.kl for part in parts]),
        in_prompt_order(groups, [part.clean for part in parts]),
    )


def head_outputs(model: Model, tokens: Int[Tensor, "prompt pos"], batch_size: int | None = None) -> list[Tensor]:
    """Z of every layer, each [prompt, pos, head, d_head]."""
    caches = [
        model.run_with_cache(tokens[rows], "z", logits_to_keep=1)[1]
        for rows in batches(len(tokens), tokens.shape[1], batch_size)
    ]
    return [torch.cat([cache["z", layer] for cache in caches]) for layer in range(model.n_layers)]


def _variants(model: Model, n_prompts: int, replacement: Callable[[int, int], Tensor]) -> list[Variant]:
    return [
        Variant(prompt, (Edit(Site("z", layer), heads=[head], value=value),))
        for prompt in range(n_prompts)
        for layer in range(model.n_layers)
        for value in [replacement(prompt, layer)]
        for head in range(model.n_heads)
    ]


def _reader(
    metric: Metric, task: Task, clean_logits: Float[Tensor, "prompt d_vocab"]
) -> Callable[[Tensor, Tensor], Float[Tensor, "row 2"]]:
    """From logits of rows and their prompts to (metric, KL from the clean run)."""

    def read(logits: Tensor, prompt: Tensor) -> Tensor:
        at = prompt.to(task.answers.device)
        value = metric(logits, task.answers[at].to(logits.device), task.wrong[at].to(logits.device))
        return torch.stack([value.float(), kl_divergence(clean_logits[prompt], logits).float()], dim=-1)

    return read
