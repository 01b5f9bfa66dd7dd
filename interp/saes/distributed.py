"""Data-parallel training under torchrun: every process takes its share of each batch, and all end with equal weights.

The model's forward passes are shared out by chunk and their rows exchanged, so that every process holds the same
buffer; of a global batch each takes its own part. Gradients are averaged, and which features fired is a maximum over
all. So two processes with batch b do what one does with batch 2b, where features and loss are of one token at a time.
What is of a batch is of each process's share, and differs by what shares differ: BatchTopK and Matryoshka select within
it, and with `target_l0` JumpReLU compares its L0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed, nn


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[int, int]]:
    """(rank, number of processes): joined for the duration of the context if torchrun started this process.

    A group that the caller has joined already is used and left as it is. NCCL on GPUs, gloo elsewhere.
    """
    if not distributed.is_available() or distributed.is_initialized() or "RANK" not in os.environ:
        yield rank_and_size()
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield rank_and_size()
    finally:
        distributed.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) for one alone."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def is_first_of_torchrun() -> bool:
    """Whether this process is the one that speaks: the only one, or the first that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def device_of_process(device: str | None) -> str | None:
    """This process's own GPU under torchrun, where the device is "cuda" without a number; else the device."""
    number = os.environ.get("LOCAL_RANK")
    return f"cuda:{number}" if device == "cuda" and number is not None else device


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes; one exchange a parameter."""
    size = rank_and_size()[1]
    if size == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= size


def any_process(flags: Bool[Tensor, " entry"]) -> Bool[Tensor, " entry"]:
    """Where any process says True."""
    if rank_and_size()[1] == 1:
        return flags
    counts = flags.to(torch.int32)
    distributed.all_reduce(counts, op=distributed.ReduceOp.MAX)
    return counts.bool()


def mean_over_processes(values: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """The mean of every entry."""
    size = rank_and_size()[1]
    if size == 1:
        return values
    total = values.clone()
    distributed.all_reduce(total)
    return total / size


def exchange_rows(own: Float[Tensor, "row d"], most: int) -> list[Float[Tensor, "row d"]]:
    """The rows of every process, in order of rank. Holds `most` rows a process while it works.

    Args:
        own: this process's rows; there may be none.
        most: rows that any process can have.
    """
    size = rank_and_size()[1]
    if size == 1:
        return [own]
    lengths = [own.new_zeros(1, dtype=torch.long) for _ in range(size)]
    distributed.all_gather(lengths, torch.tensor([len(own)], device=own.device))
    padded = own.new_zeros(most, own.shape[1])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(size)]
    distributed.all_gather(parts, padded)
    return [part[: int(length)] for part, length in zip(parts, lengths, strict=True)]
