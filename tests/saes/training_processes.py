"""Trainings in processes of their own, for tests: `python -m tests.saes.training_processes NAME FOLDER`.

Everything is imported once; each training runs in a fork, so that it can be killed, and no thread is started before.
"""

from __future__ import annotations

import csv
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import interp
from interp.saes.checkpoint import read_checkpoint
from interp.saes.training import train
from interp.saes.training_log import FILE as LOG
from tests.model.families import FAMILIES

SITES = ["blocks.1.attn.hook_z", "blocks.2.hook_resid_pre"]


def tiny() -> interp.Model:
    return interp.Model(FAMILIES["llama"].make_model("eager", torch.float32), name="tiny")


def text() -> torch.Tensor:
    return torch.randint(3, 60, (40, 16), generator=torch.Generator().manual_seed(0))


def small(**options: object) -> dict[str, object]:
    """Settings of a training of a second, with resampling, AuxK and a buffer that is filled often."""
    return {
        "n_tokens": 80 * 64,
        "batch_size": 64,
        "buffer_tokens": 1024,
        "chunk_tokens": 128,
        "k": 4,
        "dead_after_tokens": 640,
        "resample_every": 30,
        "resample_times": 1,
        "normalise": True,
        "log_every": 1,
        **options,
    }


def read_curve(path: Path) -> list[dict[str, str]]:
    """The rows of a log, without the time that it took."""
    with path.open(newline="") as file:
        return [
            {name: value for name, value in row.items() if name != "tokens_per_second"} for row in csv.DictReader(file)
        ]


def forked(work: Callable[[], object]) -> int:
    """The process that does the work."""
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    work()
    os._exit(0)


def killed_and_resumed(folder: Path) -> None:
    """One training without a break in `whole`, one killed at random moments in `broken`."""
    whole = forked(lambda: train(tiny(), SITES, text(), out=folder / "whole", **small()))
    assert os.waitpid(whole, 0)[1] == 0
    chance = random.Random(0)
    log = folder / "broken" / LOG
    n_kills = 0
    for part in range(3):
        child = forked(lambda: train(tiny(), SITES, text(), out=folder / "broken", checkpoint_seconds=0.02, **small()))
        # Somewhere in each third of the steps, and anywhere in what a step does.
        rows = 50 * part + chance.randint(10, 40)
        while (not log.exists() or log.read_bytes().count(b"\n") < rows) and not os.waitpid(child, os.WNOHANG)[0]:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        n_kills += os.waitpid(child, 0)[1] == signal.SIGKILL
    found = read_checkpoint(folder / "broken")
    (folder / "kills").write_text(f"{n_kills} {0 if found is None else found.step}")
    last = forked(lambda: train(tiny(), SITES, text(), out=folder / "broken", **small()))
    assert os.waitpid(last, 0)[1] == 0


def two_processes(folder: Path) -> None:
    """One training in one process, the same in two with half the batch each, for three architectures."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for number, (architecture, options) in enumerate(ARCHITECTURES.items()):
        alone = forked(lambda: run(folder / architecture / "one", architecture, 64, options))  # noqa: B023
        assert os.waitpid(alone, 0)[1] == 0
        pair = []
        for rank in range(2):
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port + number), "WORLD_SIZE": "2"}
            os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
            pair.append(forked(lambda: run(folder / architecture / "two", architecture, 32, options)))  # noqa: B023
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
        assert [os.waitpid(child, 0)[1] for child in pair] == [0, 0]


ARCHITECTURES: dict[str, dict[str, object]] = {
    "topk": {},
    "relu": {"k": None, "l1": 0.1, "skip_tokens": [5, 6, 7]},
}


def run(out: Path, architecture: str, batch_size: int, options: dict[str, object]) -> None:
    settings = small(n_tokens=20 * 64, **options) | {"batch_size": batch_size, "resample_every": 9}
    train(tiny(), SITES[:1], text(), architecture=architecture, out=out, **settings)


if __name__ == "__main__":
    {"killed": killed_and_resumed, "two": two_processes}[sys.argv[1]](Path(sys.argv[2]))
