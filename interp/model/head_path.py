"""From the residual stream after the last block to logits, by the model's own code: its norm, head, scale, soft-cap.

The model runs on one token, and what its last block returns is replaced by the rows wanted. So whatever a family does
after the blocks is done to them, in its own way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from interp.model.projections import bias_of
from interp.model.tower import Tower


@contextmanager
def last_block_replaced(tower: Tower, resid: Float[Tensor, "row d_model"]) -> Iterator[None]:
    """Let the last block return these rows (as one prompt), in this thread; those in between are skipped."""
    owner = threading.get_ident()

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        if threading.get_ident() != owner:
            return None
        return (resid[None], *output[1:]) if isinstance(output, tuple) else resid[None]

    with first_blocks_skipped(tower, tower.n_layers - 1), ExitStack() as stack:
        stack.callback(tower.blocks[-1].module.register_forward_hook(replace).remove)
        yield


@contextmanager
def first_blocks_skipped(tower: Tower, n_layers: int) -> Iterator[None]:
    """Leave out all of the first blocks but one, in this thread: what they return is then what the first returns.

    That one runs, because what a block returns beside the stream differs by family.
    """
    owner = threading.get_ident()
    first: list[Any] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == owner:
            first[:] = [output]

    def skipped(whole: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: first[0] if threading.get_ident() == owner else whole(*args, **options)

    with ExitStack() as stack:
        stack.callback(tower.blocks[0].module.register_forward_hook(keep).remove)
        for block in tower.blocks[1:n_layers]:
            # A call that is wrapped already (weights offloaded elsewhere) is left alone and runs.
            if "forward" not in vars(block.module):
                block.module.forward = skipped(block.module.forward)
                stack.callback(delattr, block.module, "forward")
        yield


@contextmanager
def head_cut(hf: Any, columns: Int[Tensor, " column"] | None) -> Iterator[bool]:
    """Let the language-model head compute some columns only, in this thread; whether it does.

    It does not where the head is not one plain matrix, or its call is wrapped already (weights offloaded elsewhere).
    """
    head = hf.get_output_embeddings()
    if columns is None or type(head) is not nn.Linear or "forward" in vars(head):
        yield False
        return
    columns = columns.to(head.weight.device)
    owner, whole = threading.get_ident(), head.forward
    weight, bias = head.weight[columns], bias_of(head)

    def cut(hidden: Tensor) -> Tensor:
        if threading.get_ident() != owner:
            return whole(hidden)
        return functional.linear(hidden, weight, None if bias is None else bias[columns])

    head.forward = cut  # type: ignore[assignment, method-assign]
    try:
        yield True
    finally:
        del head.forward
