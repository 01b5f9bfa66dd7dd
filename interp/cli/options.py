"""Options that several commands share, and what they say: a model, a task, axes."""

from __future__ import annotations

import difflib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from interp.model import Model
    from interp.patching.cells import Axis
    from interp.tasks import Task

MODEL = "smollm2-135m"

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Hub id, folder, .gguf file, or smollm2-135m.")]
TaskOption = Annotated[
    str, typer.Option("--task", "-t", help="A task by name, or a .jsonl or .csv file of prompt pairs.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of the task's prompts and of bootstrap intervals.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... The CPU by default.")]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16, float16. By default as stored.")]
DirectionOption = Annotated[str, typer.Option(help="denoise (does it restore?) or noise (does it break?).")]
ProgressOption = Annotated[
    bool | None, typer.Option("--progress/--no-progress", help="Progress bars. By default in a terminal only.")
]


def read_axes(text: str) -> list[Axis]:
    """The axes of the `--by` option: "layer,head"."""
    from interp.patching.cells import AXES

    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in AXES]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no axis; there are {', '.join(AXES)}")
    return names  # type: ignore[return-value]


def load_model(source: str, device: str | None, dtype: str | None) -> Model:
    """The model of the `--model` option."""
    import torch

    from interp.model.load import load

    numbers = None if dtype is None else getattr(torch, dtype, None)
    if dtype is not None and not (isinstance(numbers, torch.dtype) and numbers.is_floating_point):
        raise ValueError(f"{dtype!r} is no type of numbers that a model runs in; there are float32, bfloat16, float16")
    return load(source, device=device, dtype=numbers)


def load_model_and_task(
    source: str, task: str, n: int, seed: int, device: str | None, dtype: str | None
) -> tuple[Model, Task]:
    """The model of `--model` and the task of `--task`: by name, or the first n pairs of a file."""
    from interp.tasks import TASKS, read

    # Before the model is loaded, which takes longer.
    is_file = Path(task).suffix in (".jsonl", ".csv")
    if task not in TASKS and not is_file:
        near = difflib.get_close_matches(task, TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TASKS)}, or give a .jsonl or .csv file"
        raise ValueError(f"{task!r} is not a task; {hint}")
    if is_file and not Path(task).is_file():
        raise FileNotFoundError(f"there is no file {task}")
    model = load_model(source, device, dtype)
    return model, read(model, task)[:n] if is_file else TASKS[task](model, n, seed=seed)


def command_line() -> str:
    """The command as it was typed, for the report."""
    return shlex.join(["interp", *(word for word in sys.argv[1:] if word != "--debug")])


def summary_line(build: Any) -> str:
    """The first line of a docstring."""
    return (build.__doc__ or "").strip().partition("\n")[0]
