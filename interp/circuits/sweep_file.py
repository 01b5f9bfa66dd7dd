"""`Sweep`: which circuits a job looks for, from a TOML file.

    models = ["smollm2-135m", "gpt2"]           # hub ids, folders, .gguf files
    tasks = ["ioi", "greater_than", "mine.csv"] # names of built-in tasks, .jsonl or .csv files of prompt pairs
    methods = ["eap", "eap-ig", "relp", "acdc"] # names in `interp.circuits.METHODS`

    n = 64                  # prompt pairs that circuits are found on
    n_evaluation = 64       # further pairs that they are tested on; 0: the same ones
    seed = 0                # of the prompts, and of methods that draw numbers
    edges = 200             # of each circuit; left out: 200, or a tenth of a small graph's
    threshold = 0.01        # of methods that search ("acdc"), which choose by it instead
    selection = "top"       # or "greedy"
    signed = false          # rank by signed scores instead of magnitudes
    sizes = [0.01, 0.1, 1]  # shares of all edges in the faithfulness curve; left out: MIB's ten
    direction = "noise"     # or "denoise", for methods that have a direction
    metric = "logit_diff"   # left out: each task's own
    ablation = "resample"   # what edges outside a circuit carry in tests: or "mean", "zero"
    batch_size = 16         # prompts a pass; left out: chosen by the methods
    device = "cuda"         # left out: the CPU
    dtype = "float32"       # left out: as stored

Only the first three are needed. Paths are relative to where the job is started.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch

from interp.circuits.circuit import Selection
from interp.circuits.discover import METHODS, method_named
from interp.circuits.evaluate import ABLATIONS, MIB_SIZES, Ablation
from interp.metrics import metric_named
from interp.patching.activation import Direction
from interp.tasks import TASKS

_LISTS = ("models", "tasks", "methods")
_KINDS: Mapping[str, tuple[type, ...]] = {
    "n": (int,),
    "n_evaluation": (int,),
    "seed": (int,),
    "edges": (int,),
    "threshold": (int, float),
    "signed": (bool,),
    "batch_size": (int,),
    "selection": (str,),
    "direction": (str,),
    "metric": (str,),
    "ablation": (str,),
    "device": (str,),
    "dtype": (str,),
}


@dataclass(frozen=True)
class Sweep:
    """Every method on every task on every model, with the same choices; the module says what each field means.

    Raises:
        ValueError: naming the field, for what cannot be run.
        FileNotFoundError: for a task file that is not there.
    """

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    n: int = 64
    n_evaluation: int = 64
    seed: int = 0
    edges: int | None = None
    threshold: float | None = None
    selection: Selection = "top"
    signed: bool = False
    sizes: tuple[float, ...] = MIB_SIZES
    direction: Direction = "noise"
    metric: str | None = None
    ablation: Ablation = "resample"
    batch_size: int | None = None
    device: str | None = None
    dtype: str | None = None

    @classmethod
    def of(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> Sweep:
        """The sweep of a TOML file, or of a mapping with the same fields.

        Raises:
            ValueError: naming file and field, if it is not TOML, or says what cannot be run.
            FileNotFoundError: if it, or a task file that it names, is not there.
        """
        if isinstance(source, Mapping):
            return _sweep_of(source)
        try:
            content = tomllib.loads(Path(source).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"{os.fspath(source)}: not TOML: {error}") from None
        try:
            return _sweep_of(content)
        except ValueError as error:
            raise ValueError(f"{os.fspath(source)}: {error}") from None

    def __post_init__(self) -> None:
        for name in _LISTS:
            _check_list(name, getattr(self, name))
        if not self.sizes or not all(_is_number(size) and 0 <= size <= 1 for size in self.sizes):
            raise ValueError(f"sizes={list(self.sizes)}; they are shares of all edges, 0..1")
        for name, kinds in _KINDS.items():
            _check_kind(name, getattr(self, name), kinds)
        self._check_choices()
        for method in self.methods:
            method_named(method)
        for task in self.tasks:
            _check_task(task)
        for name, labels in (
            ("models", map(model_label, self.models)),
            ("tasks", map(task_label, self.tasks)),
        ):
            _check_distinct(name, labels)

    def _check_choices(self) -> None:
        least = {"n": 1, "n_evaluation": 0, "edges": 1, "batch_size": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"{name}={value}; it is at least {lowest}")
        for name, among in (
            ("selection", get_args(Selection)),
            ("direction", get_args(Direction)),
            ("ablation", ABLATIONS),
        ):
            if getattr(self, name) not in among:
                raise ValueError(f"{name}={getattr(self, name)!r}; it is one of {', '.join(among)}")
        if self.threshold is not None and not self.threshold > 0:
            raise ValueError(f"threshold={self.threshold}; it is greater than 0")
        if self.metric is not None:
            metric_named(self.metric)
        if self.dtype is not None:
            known = getattr(torch, self.dtype, None)
            if not isinstance(known, torch.dtype) or not known.is_floating_point:
                raise ValueError(f"dtype={self.dtype!r}; there are float32, bfloat16, float16")
        if self.device is not None:
            try:
                torch.device(self.device)
            except RuntimeError:
                raise ValueError(f"device={self.device!r}; it is cpu, cuda, cuda:1 or the like") from None

    @property
    def cells(self) -> list[tuple[str, str, str]]:
        """Model, task and method of each cell, in the order in which they are run."""
        return [(model, task, method) for model in self.models for task in self.tasks for method in self.methods]

    @property
    def choices(self) -> dict[str, Any]:
        """What is the same for all cells."""
        return {name: value for name, value in asdict(self).items() if name not in _LISTS}

    def limits(self, method: str) -> dict[str, Any]:
        """How a method is told which edges to keep: by `edges`, or by `threshold` if it searches."""
        return {"threshold": self.threshold} if METHODS[method].level == "search" else {"edges": self.edges}


def model_label(source: str) -> str:
    """The folder that a model's cells are in."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        return path.stem
    return path.resolve().name if path.exists() else source.replace("/", "--")


def task_label(task: str) -> str:
    """The folder that a task's cells are in."""
    return task if task in TASKS else Path(task).stem


def _sweep_of(content: Mapping[str, Any]) -> Sweep:
    known = [field.name for field in fields(Sweep)]
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"{name!r} is not a field of a sweep; {hint}")
    for name in _LISTS:
        if content.get(name) is None:
            raise ValueError(f"field {name!r} is missing")
    given = {name: value for name, value in content.items() if value is not None}
    listed = {name: tuple(_listed(name, given[name])) for name in (*_LISTS, "sizes") if name in given}
    return Sweep(**{**given, **listed})


def _listed(name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"field {name!r} is {value!r}; it must be a list")
    return value


def _check_list(name: str, values: Sequence[Any]) -> None:
    if not values:
        raise ValueError(f"{name} is empty; name at least one")
    for value in values:
        if not isinstance(value, str) or not value:
            raise ValueError(f"field {name!r} has {value!r}; it must be text")
    _check_distinct(name, values)


def _check_distinct(name: str, labels: Iterable[str]) -> None:
    seen: set[str] = set()
    for label in labels:
        if label in seen:
            raise ValueError(f"{name}: two of them are called {label!r}, and would be written to one folder")
        seen.add(label)


def _check_kind(name: str, value: Any, kinds: tuple[type, ...]) -> None:
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if value is not None and not fits:
        raise ValueError(f"field {name!r} is {value!r}; it must be {' or '.join(kind.__name__ for kind in kinds)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_task(task: str) -> None:
    if Path(task).suffix in (".jsonl", ".csv"):
        if not Path(task).is_file():
            raise FileNotFoundError(f"there is no file {task}")
    elif task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TASKS)}, or give a .jsonl or .csv file"
        raise ValueError(f"{task!r} is not a task; {hint}")
