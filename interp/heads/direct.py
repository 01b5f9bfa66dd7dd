"""Direct logit attribution: what each part of the model adds to the logit difference, straight through the final norm.

1. The last residual stream is a sum: embedding + every head + attention biases + every MLP.
2. With its scale frozen at the value of the run, the final norm is linear, and so is the logit of a token.
3. So the logit difference is a sum with one term a component; nothing is left over but the biases of norm and
   unembedding.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.heads.effects import effect_dataset, in_prompt_order
from interp.heads.norms import LinearNorm, linear_norm
from interp.metrics import PADDING
from interp.model import Cache, Model, Site, UnsupportedModel
from interp.patching.batching import batches
from interp.tasks import Task

By = Literal["head", "layer", "component"]


@dataclass(frozen=True)
class Terms:
    """The terms of the logit difference of each prompt."""

    embed: Float[Tensor, " prompt"]
    heads: Float[Tensor, "prompt layer head"]
    attn_bias: Float[Tensor, "prompt layer"]
    mlp: Float[Tensor, "prompt layer"]
    bias: Float[Tensor, " prompt"]
    """Biases of the final norm and of the unembedding."""
    total: Float[Tensor, " prompt"]
    """The logit difference itself, through the model's own final norm."""

    @property
    def attention(self) -> Float[Tensor, "prompt layer"]:
        """What each layer's attention adds, bias included."""
        return self.heads.sum(-1) + self.attn_bias

    @property
    def sum(self) -> Float[Tensor, " prompt"]:
        """The sum of all terms."""
        return self.embed + self.attention.sum(-1) + self.mlp.sum(-1) + self.bias


def direct_logit_attribution(
    model: Model,
    task: Task,
    *,
    by: By = "head",
    per_prompt: bool = False,
    batch_size: int | None = None,
) -> xr.Dataset:
    """What each component writes towards the answer: its share of logit(answers) − logit(wrong answers), in logits.

    Direct effects only: what later layers make of a component's output is counted as theirs. The final norm's scale is
    that of the clean run, which makes the attribution exact: the terms add up to the logit difference (attr `sum_error`
    is the largest gap left by rounding). Where a family soft-caps its logits, the difference is that before the cap.
    Costs one forward pass a prompt.

    Args:
        model: the model.
        task: its clean prompts, read at the last token; several answers count by their mean.
        by: "head": [layer, head]; "layer": [layer, part], attention (with its bias) and MLP; "component": one axis with
            everything, "embed", "L0H0", ..., "L0 attn bias", "L0 mlp", ..., "bias" (final norm and unembedding).
        per_prompt: keep a `prompt` axis in `effect`.
        batch_size: prompts a forward pass; by default about a thousand tokens' worth.

    Returns:
        Dataset of `effect` with `low` and `high`, its 95% bootstrap interval over prompts.

    Raises:
        UnsupportedModel: for post-norm models, whose residual stream is not a sum of outputs.
        ValueError: if a prompt has no wrong answer to hold the answer against.
    """
    started = time.perf_counter()
    if by not in ("head", "layer", "component"):
        raise ValueError(f"by={by!r}; it is one of 'head', 'layer', 'component'")
    terms = logit_terms(model, task, batch_size=batch_size)
    attrs = {
        "method": "direct_logit_attribution",
        "ablation": "none",
        "metric": "logit_diff",
        "metric_clean": float(terms.total.mean()),
        "embed": float(terms.embed.mean()),
        "bias": float(terms.bias.mean()),
        "sum_error": float((terms.sum - terms.total).abs().max()),
        "before_soft_cap": int(getattr(model.tower.config, "final_logit_softcapping", None) is not None),
        "seconds": time.perf_counter() - started,
    }
    values, dims, coords = _arranged(terms, by)
    return effect_dataset(values, dims, model, task, attrs, per_prompt=per_prompt, coords=coords)


def logit_terms(model: Model, task: Task, *, batch_size: int | None = None) -> Terms:
    """The terms of the logit difference of every clean prompt, float32, in the order of the task."""
    if model.tower.post_norm:
        raise UnsupportedModel(
            f"{model.anatomy.family} normalises after each addition (post-norm), so its last residual stream is not a "
            "sum of what the components wrote: there is no direct logit attribution; use leave_one_out"
        )
    if bool((task.wrong == PADDING).all(-1).any()):
        raise ValueError("a prompt has no wrong answer: direct logit attribution splits logit(answers) − logit(wrong)")
    final = linear_norm(model.tower.ln_final, model.d_model, model.device)
    after_attention = [linear_norm(block.attn_post, model.d_model, model.device) for block in model.tower.blocks]
    groups = task.by_length()
    parts = []
    for group in groups:
        for rows in batches(len(group), group.clean.shape[1], batch_size):
            direction, constant = _unembedding(model, group.answers[rows], group.wrong[rows])
            _, cache = model.run_with_cache(
                group.clean[rows],
                ["embed", "z", "mlp_out", Site("resid_post", model.n_layers - 1)],
                positions=-1,
                dtype=torch.float32,
                device=model.device,
                logits_to_keep=1,
            )
            parts.append(_terms(model, cache, final, after_attention, direction, constant))
    by_name = {field.name: [getattr(part, field.name).cpu() for part in parts] for field in fields(Terms)}
    return Terms(**{name: in_prompt_order(groups, values) for name, values in by_name.items()})


def _unembedding(
    model: Model, answers: Int[Tensor, "prompt n_answers"], wrong: Int[Tensor, "prompt n_wrong"]
) -> tuple[Float[Tensor, "prompt d_model"], Float[Tensor, " prompt"]]:
    """The logit difference as a linear function of the normed stream: (direction, constant)."""
    W_U, b_U = model.W_U, model.b_U
    if W_U.shape[0] != model.d_model:
        raise UnsupportedModel(f"{model.anatomy.family} projects the stream ({model.d_model}) before unembedding it")
    direction, constant = torch.zeros(()), torch.zeros(())
    for ids, sign in ((answers, 1.0), (wrong, -1.0)):
        ids = ids.to(W_U.device)
        share = (ids != PADDING).float() / (ids != PADDING).sum(-1, keepdim=True) * sign * model.weights.logit_scale
        columns = ids.clamp(min=0)
        direction = direction + torch.einsum("dpn,pn->pd", W_U[:, columns].float(), share)
        constant = constant + (b_U[columns].float() * share).sum(-1)
    return direction.to(model.device), constant.to(model.device)


def _terms(
    model: Model,
    cache: Cache,
    final: LinearNorm,
    after_attention: Sequence[LinearNorm],
    unembedding: Float[Tensor, "prompt d_model"],
    constant: Float[Tensor, " prompt"],
) -> Terms:
    last = cache["resid_post", model.n_layers - 1][:, -1].to(final.gain.device)
    inverse_scale = final.inverse_scale(last)
    direction = final.transposed(unembedding.to(last.device)) * inverse_scale
    bias = ((unembedding.to(last.device) * final.bias).sum(-1) + constant.to(last.device)).cpu()
    written = [
        _attention_terms(model, layer, cache["z", layer][:, -1], after_attention[layer], direction)
        for layer in range(model.n_layers)
    ]
    mlp = [(cache["mlp_out", layer][:, -1].to(last.device) * direction).sum(-1) for layer in range(model.n_layers)]
    return Terms(
        embed=(cache["embed"][:, -1].to(last.device) * direction).sum(-1).cpu(),
        heads=torch.stack([heads.cpu() for heads, _ in written], dim=1),
        attn_bias=torch.stack([bias.cpu() for _, bias in written], dim=1),
        mlp=torch.stack(mlp, dim=1).cpu(),
        bias=bias,
        total=(final.apply(last) * inverse_scale * unembedding.to(last.device)).sum(-1).cpu() + bias,
    )


def _attention_terms(
    model: Model,
    layer: int,
    z: Float[Tensor, "prompt head d_head"],
    post: LinearNorm,
    direction: Float[Tensor, "prompt d_model"],
) -> tuple[Float[Tensor, "prompt head"], Float[Tensor, " prompt"]]:
    """What each head of a layer writes along a direction, and what the biases do; through the post-norm, if any."""
    W_O = model.weights.of_block("W_O", layer).float()
    b_O = model.weights.of_block("b_O", layer).float()
    direction = direction.to(W_O.device) * model.tower.residual_multiplier
    z = z.to(W_O.device)
    output = torch.einsum("phd,hdm->pm", z, W_O) + b_O
    before_post = post.transposed(direction) * post.inverse_scale(output)
    heads = torch.einsum("phd,hdm,pm->ph", z, W_O, before_post)
    return heads, (before_post * b_O).sum(-1) + (direction * post.bias).sum(-1)


def _arranged(terms: Terms, by: By) -> tuple[Float[Tensor, "prompt ..."], tuple[str, ...], dict[str, Any]]:
    """(values, names of their axes after the prompt, coordinates)."""
    if by == "head":
        return terms.heads, ("layer", "head"), {}
    if by == "layer":
        values = torch.stack([terms.attention, terms.mlp], dim=-1)
        return values, ("layer", "part"), {"part": ["attention", "mlp"]}
    n_layers, n_heads = terms.heads.shape[1:]
    in_blocks = torch.cat([terms.heads, terms.attn_bias[..., None], terms.mlp[..., None]], dim=-1).flatten(1)
    names = [
        name
        for layer in range(n_layers)
        for name in (*(f"L{layer}H{head}" for head in range(n_heads)), f"L{layer} attn bias", f"L{layer} mlp")
    ]
    values = torch.cat([terms.embed[:, None], in_blocks, terms.bias[:, None]], dim=-1)
    return values, ("component",), {"component": ["embed", *names, "bias"]}
