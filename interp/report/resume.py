"""Parts of a long computation kept on disk, so that the same call goes on where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from interp.model import Model
from interp.report.reading import read
from interp.report.writing import write_netcdf
from interp.tasks import Task

logger = logging.getLogger(__name__)


class Parts:
    """Finished parts as netCDF files in a folder of their own; a part of another computation is not taken.

    Args:
        folder: where they are kept; None keeps nothing.
        fingerprint: what the computation depends on, as text: see `fingerprint`.
    """

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        self.folder = folder
        self._fingerprint = fingerprint

    def get(self, name: str, compute: Callable[[], xr.Dataset]) -> xr.Dataset:
        """The part of this name: from the folder if it is there, else computed and kept there, whole or not at all."""
        if self.folder is None:
            return compute()
        path = self.folder / f"{name.replace(' ', '_')}.nc"
        stored = self._stored(path)
        if stored is not None:
            logger.info("%s: taken from %s", name, path)
            return stored.drop_attrs(deep=False)
        part = compute()
        self.folder.mkdir(exist_ok=True)
        write_netcdf(part.assign_attrs(fingerprint=self._fingerprint), path)
        return part

    def _stored(self, path: Path) -> xr.Dataset | None:
        if not path.is_file():
            return None
        try:
            stored = read(path)
        except ValueError as error:
            logger.warning("%s; computing it again", error)
            return None
        return stored if stored.attrs.get("fingerprint") == self._fingerprint else None


def fingerprint(model: Model, task: Task, choices: dict[str, Any]) -> str:
    """A digest of what a result depends on: weights (by a sample of them), prompts, choices and versions."""
    with torch.no_grad():
        sample = [float(parameter.flatten()[:64].double().sum()) for parameter in model.hf.parameters()]
    content = {
        "model": model.name,
        "dtype": str(model.dtype),
        "weights": sample,
        "prompts": [task.clean_ids, task.corrupted_ids, task.answers.tolist(), task.wrong.tolist(), task.metric],
        "choices": choices,
        "torch": str(torch.__version__),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
