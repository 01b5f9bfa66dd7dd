"""One plain forward pass of a transformers model, as every call of `Model` makes it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from jaxtyping import Float
from torch import Tensor


def forward(
    hf: Any, arguments: Collection[str], inputs: Mapping[str, Any], logits_to_keep: int
) -> Float[Tensor, "batch *kept d_vocab"]:
    """Logits, or the last hidden state of a model without a language-model head; without a KV cache.

    Args:
        hf: the transformers model.
        arguments: names that its `forward` takes.
        inputs: arguments by name.
        logits_to_keep: 0 for all positions, k for the last k only.
    """
    options: dict[str, Any] = {"return_dict": True}
    if "use_cache" in arguments:
        options["use_cache"] = False
    if logits_to_keep and "logits_to_keep" in arguments:
        options["logits_to_keep"] = logits_to_keep
    with _contiguous_head(hf) if logits_to_keep else nullcontext():
        output = hf(**inputs, **options)
    logits = output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state
    return logits[:, -logits_to_keep:] if logits_to_keep else logits


@contextmanager
def _contiguous_head(hf: Any) -> Iterator[None]:
    """Hand the language-model head its rows in one piece.

    transformers cuts the positions to keep out of the hidden states of all; of a cut like that torch makes one small
    product a prompt, ten times slower than one product of all prompts.
    """
    head = hf.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda module, args: tuple(one.contiguous() for one in args))
    try:
        yield
    finally:
        handle.remove()
