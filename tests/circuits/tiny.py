"""Tiny random models and a task on them, for tests of circuits."""

from __future__ import annotations

import torch

import interp
from interp.metrics import logit_diff
from tests.model.families import FAMILIES
from tests.patching.tokens_task import task_of_tokens

NO_STREAM = ("bert", "roberta", "distilbert", "opt-post_norm")
"""Families that norm the stream after every addition."""
TEXT_FAMILIES = [
    name
    for name in FAMILIES
    if name not in (*NO_STREAM, "vit", "clip") and not name.startswith(("dinov2", "llava", "paligemma", "qwen2_vl"))
]
EDGE_FAMILIES = ("gpt2", "gpt_neox", "gptj", "llama", "llama-multi_query", "qwen3", "gemma3_text", "phi", "granite")
"""Multi-head, parallel, outside the attention interface, grouped, multi-query, QK-norm, post-norm, one shared norm,
scaled residuals."""


def tiny_model(name: str, dtype: torch.dtype = torch.float64) -> interp.Model:
    """A tiny random model of a family."""
    return interp.Model(FAMILIES[name].make_model("eager", dtype), name=name)


def tiny_task(n: int = 2, seed: int = 0) -> interp.tasks.Task:
    """Prompts of 7 random tokens that differ at two positions."""
    clean = torch.randint(10, 20, (n, 7), generator=torch.Generator().manual_seed(seed))
    corrupted = clean.clone()
    corrupted[:, 2] = (corrupted[:, 2] - 9) % 7 + 11
    corrupted[:, 4] = 5
    return task_of_tokens(clean, corrupted)


def mean_difference(logits: torch.Tensor, task: interp.tasks.Task) -> torch.Tensor:
    """Mean logit difference of last-position logits."""
    return logit_diff(logits, task.answers, task.wrong).mean()


def linear_model() -> interp.Model:
    """A model whose metric is linear in every edge: no MLP, no norm, attention that looks everywhere alike."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        for block in model.tower.blocks:
            block.down.weight.zero_()
            block.down.bias.zero_()
            d_model = model.d_model
            block.qkv.weight[:, : 2 * d_model] = 0  # no queries and keys: every key counts the same
            block.qkv.bias[: 2 * d_model] = 0
    blocks = model.hf.transformer.h
    for block in blocks:
        block.ln_1 = torch.nn.Identity()
        block.ln_2 = torch.nn.Identity()
    model.hf.transformer.ln_f = torch.nn.Identity()
    return interp.Model(model.hf, name="linear")
