"""interp: exact interventions, and estimates that say how far to trust them, on any Hugging Face transformer.

>>> import interp
>>> model = interp.load("smollm2-135m")
>>> task = interp.tasks.ioi(model, n=32)
>>> effects = interp.patching.activation_patching(model, task, site="resid_pre")
"""

from __future__ import annotations

import importlib
from typing import Any

from interp.model import Cache, Edit, Model, Site, SiteUnavailable, UnsupportedModel

__version__ = "0.1.0"
__all__ = ["Cache", "Edit", "Model", "Site", "SiteUnavailable", "UnsupportedModel", "load"]

_ROOMS = ("heads", "metrics", "patching", "report", "tasks")


def __getattr__(name: str) -> Any:
    """Rooms, and `load`, are imported when first used."""
    if name == "load":
        return importlib.import_module("interp.model.load").load
    if name in _ROOMS:
        return importlib.import_module(f"interp.{name}")
    raise AttributeError(f"module 'interp' has no attribute {name!r}")
