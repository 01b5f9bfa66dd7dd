"""Files of weights and settings, read with every field checked and written whole.

Three kinds of weight file: safetensors, PyTorch's `.pt` and NumPy's `.npz`; none is ever unpickled beyond tensors. What
is wrong is said in one line that names the file and the field.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

T = TypeVar("T")
D = TypeVar("D")

_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}
_REQUIRED: Any = object()

_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)
"""Of a damaged file: broken directory or compression, and headers that claim unknown compression or a password."""


@dataclass(frozen=True)
class Settings:
    """The JSON object of a settings file, or an object inside it."""

    path: Path
    content: Mapping[str, Any]
    prefix: str = ""
    """Where in the file this object stands: "trainer.", or nothing."""

    def __contains__(self, name: str) -> bool:
        return self.content.get(name) is not None

    @overload
    def get(self, name: str, kind: type[T]) -> T: ...
    @overload
    def get(self, name: str, kind: type[T], default: D) -> T | D: ...
    def get(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """One field.

        Raises:
            ValueError: if it is missing (or null) and has no default, or is of another kind.
        """
        value = self.content.get(name)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self.path}: field '{self.prefix}{name}' is missing")
            return default
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise ValueError(f"{self.path}: field '{self.prefix}{name}' is {value!r}; it must be {_KINDS[kind]}")
        return value

    def size(self, name: str) -> int:
        """A field that is a whole number above 0."""
        value = self.get(name, int)
        if value < 1:
            raise ValueError(f"{self.path}: field '{self.prefix}{name}' is {value}; it must be 1 or more")
        return value

    def part(self, name: str) -> Settings:
        """An object inside this one."""
        return Settings(self.path, self.get(name, dict), f"{self.prefix}{name}.")


@dataclass
class Weights:
    """The tensors of one file: each is taken once, checked, and none may be left over."""

    path: Path
    tensors: dict[str, Tensor]
    taken: set[str] = field(default_factory=set)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str, n_axes: int) -> tuple[int, ...]:
        """The shape of a tensor that says how large the others are.

        Raises:
            ValueError: if it is missing, or has another number of axes.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.path}: tensor {name!r} is missing; there are {', '.join(sorted(self.tensors))}")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != n_axes or not all(shape):
            raise ValueError(f"{self.path}: tensor {name!r} has shape {shape}; it must have {n_axes} axes")
        return shape

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of this shape, in float32 or another type.

        Raises:
            ValueError: if it is missing, of another shape, not of floating point, or not finite.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.path}: tensor {name!r} is missing; there are {', '.join(sorted(self.tensors))}")
        tensor = self.tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{self.path}: tensor {name!r} has shape {tuple(tensor.shape)}; {shape} was expected")
        if not tensor.is_floating_point():
            raise ValueError(f"{self.path}: tensor {name!r} is {tensor.dtype}; it must be of floating point")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{self.path}: tensor {name!r} has NaN or infinity in it")
        self.taken.add(name)
        return tensor.detach().to(dtype).contiguous()

    def whole(self, name: str, *shape: int) -> list[int]:
        """The entries of a tensor of whole numbers."""
        if tuple(self.shape(name, len(shape))) != shape or self.tensors[name].is_floating_point():
            raise ValueError(f"{self.path}: tensor {name!r} is not of {shape} whole numbers")
        self.taken.add(name)
        return [int(value) for value in self.tensors[name].flatten()]

    def finish(self) -> None:
        """Refuse a file with tensors that nobody asked for: what they would do is not known."""
        left = sorted(set(self.tensors) - self.taken)
        if left:
            raise ValueError(f"{self.path}: tensor {left[0]!r} is not known for this kind of SAE")


def read_settings(path: Path) -> Settings:
    """A JSON object from a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: the file is missing") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error.msg} at line {error.lineno}); it may be cut off") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return Settings(path, content)


def read_weights(path: Path) -> Weights:
    """The tensors of a `.safetensors`, `.npz` or (for any other name) PyTorch file, on the CPU.

    Raises:
        ValueError: if the file is missing, damaged, or holds anything besides named tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path}: the file is missing")
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz}
    return Weights(path, readers.get(path.suffix, _read_torch)(path))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({_one_line(error)})") from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # The message of torch advises to load it all the same.
        raise ValueError(
            f"{path}: refused: it is damaged, or a pickle of more than tensors, which could run code"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a whole PyTorch file ({_one_line(error)})") from None
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ValueError(f"{path}: not a dictionary of named tensors")
    return dict(content)


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}
    except (ValueError, OSError, EOFError, KeyError, TypeError, AttributeError, *_ZIP_ERRORS) as error:
        raise ValueError(f"{path}: not a whole .npz file of numbers ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in the kind that the name says, floating point as float32; the file appears when it is whole."""
    stored = {name: _plain(tensor) for name, tensor in tensors.items()}
    with _whole(path) as part:
        if path.suffix == ".safetensors":
            save_file(stored, part)
        elif path.suffix == ".npz":
            with part.open("wb") as file:
                np.savez(file, allow_pickle=False, **{name: tensor.numpy() for name, tensor in stored.items()})
        else:
            torch.save(stored, part)


def _plain(tensor: Tensor) -> Tensor:
    """A copy on the CPU: views would carry the memory of what they look at into the file."""
    tensor = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
    return tensor.clone(memory_format=torch.contiguous_format)


def write_pair(settings: Path, content: Mapping[str, Any], weights: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write settings and weights that belong together.

    Old settings go first and new ones come last, so that a folder half-written over has no settings, never wrong ones.
    """
    try:
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{settings.name} cannot be written: {error}; metadata must be JSON-able") from None
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.unlink(missing_ok=True)
    write_weights(weights, tensors)
    with _whole(settings) as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        usual = part.stat().st_mode
        yield part
        # safetensors makes files that their owner alone can read.
        part.chmod(usual)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
