"""What the machine is, and its matrix-product limit, measured in the same run as whatever stands beside it."""

from __future__ import annotations

import platform
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers


def describe() -> str:
    """Device and versions, one line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return (
        f"{device}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def interleaved_seconds(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function, called in turn, so that a slow moment of the machine hits all alike."""
    for function in functions.values():
        function()
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def matmul_gflops(rows: int = 1024, inner: int = 576, columns: int = 1536, repeats: int = 30) -> float:
    """Rate of a plain float32 matrix product of the size of one MLP projection on a batch of prompts, GFLOP/s."""
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    seconds = interleaved_seconds({"matmul": lambda: left @ right}, repeats)["matmul"]
    return 2 * rows * inner * columns / seconds / 1e9


class _Memory:
    megabytes = 0.0


@contextmanager
def peak_memory() -> Iterator[_Memory]:
    """Peak memory of the process above what it held at the start, sampled every few milliseconds."""
    page = resource.getpagesize()
    stop, seen = threading.Event(), _Memory()

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page / 1e6

    start = resident()

    def watch() -> None:
        while not stop.wait(0.01):
            seen.megabytes = max(seen.megabytes, resident() - start)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        stop.set()
        watcher.join()
