"""interp: exact interventions, and estimates that say how far to trust them, on any Hugging Face transformer.

>>> import interp
>>> model = interp.load("smollm2-135m")
>>> task = interp.tasks.ioi(model, n=32)
>>> effects = interp.patching.activation_patching(model, task, site="resid_pre")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp.model import Cache, Edit, Model, Site, SiteUnavailable, UnsupportedModel
    from interp.model.load import load

__version__ = "0.1.0"
__all__ = ["Cache", "Edit", "Model", "Site", "SiteUnavailable", "UnsupportedModel", "load"]

_ROOMS = ("circuits", "heads", "metrics", "model", "patching", "report", "saes", "sinks", "tasks", "vision", "zoo")


def __getattr__(name: str) -> Any:
    """Rooms and names are imported when first used: torch and transformers take seconds."""
    if name == "load":
        return importlib.import_module("interp.model.load").load
    if name in __all__:
        return getattr(importlib.import_module("interp.model"), name)
    if name in _ROOMS:
        return importlib.import_module(f"interp.{name}")
    raise AttributeError(f"module 'interp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS, "__version__"])
