"""Every notebook runs from top to bottom."""

from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_notebook_runs(path, monkeypatch):
    # As many threads as this worker has: the kernel is a process of its own and would take every core.
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
    failed = [
        cell for cell in notebook.cells if any(output.output_type == "error" for output in cell.get("outputs", []))
    ]
    assert not failed
    assert all(not cell.outputs for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"), (
        "notebooks are stored without outputs"
    )
