"""What a result was made with: model, task, versions and hardware."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from interp.model import Model
from interp.patching.labels import provenance
from interp.tasks import Task


def describe_run(model: Model, task: Task) -> dict[str, Any]:
    """Attrs that let someone else make the same report; all of them survive netCDF and JSON."""
    shared = f", {model.n_kv_heads} key/value heads" if model.n_kv_heads != model.n_heads else ""
    return {
        **provenance(model, task),
        "architecture": f"{model.anatomy.family}, {model.n_layers} layers, {model.n_heads} heads{shared}",
        "metric": task.metric,
        "description": task.description,
        "corruption": task.corruption,
        "python": platform.python_version(),
        "hardware": hardware(model.device),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def hardware(device: torch.device) -> str:
    """The processor that the model ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _processor() -> str:
    """The processor's name where the system tells it (Linux), its architecture elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
