"""SAEs as files: saved in SAELens's layout by default, loaded from any of five formats by the files that are there.

| format | files | also written |
|---|---|---|
| saelens | `cfg.json`, `sae_weights.safetensors` | yes: every architecture and transcoder |
| dictionary_learning | `config.json`, `ae.pt` | yes: autoencoders |
| sparsify | `cfg.json`, `sae.safetensors` | yes: top-k |
| gemma_scope | `params.npz` | yes: what is a JumpReLU at inference |
| attention_output | `<name>.pt`, `<name>_cfg.json` | no |

What is loaded computes what the original library computes, in float32 on the CPU; nothing is made before every
field has been checked, and a pickle is read only as far as it holds tensors.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

from interp.saes import attention_output, dictionary_learning, gemma_scope, saelens, sparsify
from interp.saes.sae import SAE

Format = Literal["saelens", "dictionary_learning", "sparsify", "gemma_scope", "attention_output"]

FORMATS: tuple[Format, ...] = get_args(Format)
"""The names of the formats."""

_WEIGHTS: dict[str, Format] = {
    saelens.WEIGHTS_FILE: "saelens",
    sparsify.WEIGHTS_FILE: "sparsify",
    dictionary_learning.WEIGHTS_FILE: "dictionary_learning",
    gemma_scope.WEIGHTS_FILE: "gemma_scope",
}


def save(sae: SAE, folder: str | os.PathLike[str], *, format: Format = "saelens") -> Path:
    """Write an SAE into a folder, made where it is not there; a file appears when it is whole.

    Weights are written in float32. In SAELens's layout `load` gives back the same class with the same settings and
    metadata. The others keep the function (features and reconstruction) and the site, but `params.npz` has no place for
    a site: set it again after loading.

    Args:
        sae: any SAE; see the table for what each format holds.
        folder: where to; what an SAE was saved there is overwritten.
        format: a name of the table.

    Returns:
        The folder.

    Raises:
        ValueError: if the format cannot hold this SAE, or is one that is only read; nothing is written then.
    """
    target = Path(folder)
    writers = {
        "saelens": saelens.save,
        "dictionary_learning": dictionary_learning.save,
        "sparsify": sparsify.save,
        "gemma_scope": gemma_scope.save,
    }
    if format not in writers:
        raise ValueError(f"format={format!r} is not one that is written; choose {', '.join(map(repr, writers))}")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: a file; an SAE is saved as a folder")
    writers[format](sae, target)
    return target


def load(path: str | os.PathLike[str], format: Format | None = None) -> SAE:
    """Read an SAE from a folder, or from its weights file.

    Args:
        path: the folder or the weights file.
        format: a name of the table; by default told from the files.

    Raises:
        NotImplementedError: naming file and field, for what has no equal here, such as a scale for each token.
        ValueError: naming file and field, if a file is missing, damaged, foreign or contradicts another.
    """
    source = Path(path)
    if not source.exists():
        raise ValueError(f"{source}: there is no such folder or file")
    if format is not None and format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; choose {', '.join(map(repr, FORMATS))}")
    format = format or recognise(source)
    if format in ("saelens", "sparsify") and not source.is_dir():
        expected = saelens.WEIGHTS_FILE if format == "saelens" else sparsify.WEIGHTS_FILE
        if source.name != expected:
            raise ValueError(f"{source}: the weights of a {format} folder are called {expected}; give the folder")
        source = source.parent
    readers = {
        "saelens": saelens.load,
        "dictionary_learning": dictionary_learning.load,
        "sparsify": sparsify.load,
        "gemma_scope": gemma_scope.load,
        "attention_output": attention_output.load,
    }
    return readers[format](source)


def recognise(path: Path) -> Format:
    """The format of a folder or file, by the names of its files.

    Raises:
        ValueError: if they fit none, or several.
    """
    if not path.is_dir():
        return _format_of_file(path)
    found = [format for name, format in _WEIGHTS.items() if (path / name).exists()]
    if any(attention_output.settings_of(file).exists() for file in path.glob("*.pt")):
        found.append("attention_output")
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{path}: has files of {' and '.join(found)}; say which with format=")
    inside = sorted(each.name for each in path.iterdir() if any((each / name).exists() for name in _WEIGHTS))
    if inside:
        raise ValueError(f"{path}: holds SAEs in folders of its own, give one of them: {', '.join(inside)}")
    raise ValueError(f"{path}: no SAE in it; looked for {', '.join(_WEIGHTS)} and <name>.pt with <name>_cfg.json")


def _format_of_file(path: Path) -> Format:
    if path.name in _WEIGHTS:
        return _WEIGHTS[path.name]
    if path.suffix == ".npz":
        return "gemma_scope"
    if path.suffix == ".pt":
        return "attention_output" if attention_output.settings_of(path).exists() else "dictionary_learning"
    raise ValueError(f"{path}: not the weights of an SAE by its name; give its folder, or say which with format=")


def convert(path: str | os.PathLike[str], out: str | os.PathLike[str], format: Format = "saelens") -> Path:
    """Load an SAE of any format and save it in another.

    Args:
        path: a folder or a weights file; its format is told from the files.
        out: the folder to write; not the one that is read.
        format: of what is written.

    Returns:
        The folder.

    Raises:
        NotImplementedError: as `load` does.
        ValueError: as `load` and `save` do, or if both paths are the same folder.
    """
    source, target = Path(path), Path(out)
    if target.resolve() in (source.resolve(), source.resolve().parent if source.is_file() else source.resolve()):
        raise ValueError(f"{target}: is the folder that is read; choose another to write")
    return save(load(source), target, format=format)
