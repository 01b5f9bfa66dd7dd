"""Checkpoints: one safetensors file that is whole or not there, with what training needs to go on exactly."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "interp.sae.checkpoint"
FORMAT_VERSION = 2
FILE = "checkpoint.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Training after a number of steps."""

    step: int
    """Steps done."""
    settings: Mapping[str, Any]
    """What the course of training depends on, JSON-able."""
    values: Mapping[str, Any]
    """Numbers beside the tensors, JSON-able."""
    tensors: Mapping[str, Tensor]


def write_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write it in place of the last one; a reader, or a kill, finds the old or the new one whole."""
    about = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "step": checkpoint.step,
        "settings": dict(checkpoint.settings),
        "values": dict(checkpoint.values),
    }
    part = folder / f".{FILE}.part"
    tensors = {name: tensor.detach().contiguous() for name, tensor in checkpoint.tensors.items()}
    save_file(tensors, part, metadata={"interp": json.dumps(about)})
    os.replace(part, folder / FILE)


def read_checkpoint(folder: Path, device: torch.device | str = "cpu") -> Checkpoint | None:
    """The checkpoint in a folder; None if there is none.

    Raises:
        ValueError: if the file is damaged, of another kind or of a later version.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            about = json.loads((file.metadata() or {})["interp"])
            if about["format"] != FORMAT or about["version"] != FORMAT_VERSION:
                raise ValueError(f"format {about['format']!r} version {about['version']!r}; {FORMAT} 1 is read here")
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
        return Checkpoint(about["step"], about["settings"], about["values"], tensors)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a checkpoint of this interp: {error}") from None


def check_settings(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with other settings than the checkpoint was made with.

    Raises:
        ValueError: naming the first setting that differs.
    """
    # Through JSON, as the stored ones have been: tuples are lists there.
    wanted = json.loads(json.dumps(dict(wanted)))
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{folder} was begun with {name}={found.get(name)!r}, not {wanted.get(name)!r}: give the same "
                "settings to go on with it, or another folder"
            )


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimiser's state, by parameter and name."""
    state = optimiser.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimiser_tensors` gave; learning rates are left to the schedule."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
