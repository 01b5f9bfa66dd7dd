"""Two processes with batch b do what one does with batch 2b."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from interp.saes import distributed
from interp.saes.checkpoint import FILE
from interp.saes.distributed import device_of_process
from tests.saes.training_processes import ARCHITECTURES, read_curve

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "tests.saes.training_processes", "two", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_processes_equal_one_with_the_doubled_batch(folder: Path, architecture: str) -> None:
    one, two = (load_file(folder / architecture / name / FILE) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-5)
    curves = [read_curve(folder / architecture / name / "log.csv") for name in ("one", "two")]
    assert len(curves[0]) == len(curves[1]) == 20
    for alone, together in zip(*curves, strict=True):
        assert float(together["loss"]) == pytest.approx(float(alone["loss"]), rel=1e-4)
        assert float(together["l0"]) == pytest.approx(float(alone["l0"]), rel=1e-3)
        assert together["dead"] == alone["dead"]


def test_gradients_are_means_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam hides a factor that is the same at every step: this is not seen above."""
    monkeypatch.setattr(distributed, "rank_and_size", lambda: (0, 2))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda gradient: gradient.add_(3.0))
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 5.0])
    distributed.average_gradients([parameter])
    assert parameter.grad.tolist() == [2, 4]


def test_cuda_is_the_gpu_of_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [device_of_process(one) for one in ("cuda", "cpu", None)] == ["cuda", "cpu", None]
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [device_of_process(one) for one in ("cuda", "cuda:1", "cpu", None)] == ["cuda:3", "cuda:1", "cpu", None]
