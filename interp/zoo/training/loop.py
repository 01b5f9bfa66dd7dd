"""The training loop that the scripts share, and the file that they write."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)


def arguments(description: str, *, steps: int) -> argparse.Namespace:
    """Command-line options: the file to write, the seed, and the number of steps."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=steps)
    return parser.parse_args()


def train(hf: Any, loss: Callable[[Any], Tensor], *, steps: int, learning_rate: float) -> None:
    """Minimise a loss that draws its own batch, with AdamW, a short warm-up and a cosine decay to zero.

    Parameters that require no gradient stay as they are; the model is left in evaluation mode.
    """
    trained = [parameter for parameter in hf.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    warm_up = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimiser,
        [
            torch.optim.lr_scheduler.LinearLR(optimiser, 0.01, total_iters=warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps - warm_up)),
        ],
        milestones=[warm_up],
    )
    hf.train()
    for step in range(steps):
        optimiser.zero_grad()
        value = loss(hf)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            logger.info("step %5d  loss %.4f", step, value.item())
    hf.eval()


def save(hf: Any, path: Path, **notes: object) -> None:
    """Write the weights with notes on how they came about; a run killed half-way leaves no torn file."""
    weights = {name: tensor.detach().contiguous() for name, tensor in hf.state_dict().items()}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # One entry: safetensors writes several in an order that changes from run to run.
        save_file(weights, unfinished, metadata={"training": json.dumps(notes)})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    logger.info("%s: %.0f kB, %s", path, path.stat().st_size / 1e3, notes)
