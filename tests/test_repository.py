"""The repository itself: its links, and what importing the package brings with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKS = ("patching", "circuits", "saes", "kernels")
IMPORTED_WHERE_USED = {"IPython", "matplotlib", "networkx", "nnsight", "plotly", "ray", "sklearn", "transformer_lens"}


def run_in_root(code: str) -> str:
    """Output of Python started in the repository's root, where the links are importable names."""
    process = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, ''); {code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def top_level_modules_after(modules: str) -> set[str]:
    return set(run_in_root(f"import {modules}; print(*{{name.partition('.')[0] for name in sys.modules}})").split())


@pytest.mark.parametrize("name", LINKS)
def test_root_link_is_relative_and_leads_to_the_room(name):
    link = ROOT / name
    assert link.is_symlink()
    assert link.readlink() == Path("interp") / name
    assert (link / "__init__.py").is_file()


@pytest.mark.parametrize("library", ["transformers", "transformer_lens", "nnsight"])
def test_libraries_import_beside_the_root_links(library):
    if library != "transformers":
        pytest.importorskip(library, reason=f"{library} is not installed (extra: interop)")
    model_code = "from transformers import LlamaForCausalLM; import transformers.integrations.hub_kernels"
    assert run_in_root(f"import {library}; {model_code}; print('imported')") == "imported"


def test_kernels_link_does_not_answer_as_the_kernels_library():
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    installed = run_in_root("import importlib.metadata as m; print('kernels' in {d.name for d in m.distributions()})")
    assert run_in_root(code) == installed


@pytest.fixture(scope="module")
def brought_by_transformers() -> set[str]:
    """transformers imports some of them itself (scikit-learn, if there is one): they cost nothing more then."""
    return top_level_modules_after("torch, transformers.modeling_utils, transformers.generation.utils")


@pytest.mark.parametrize("module", ["interp", "interp.model.load", "interp.patching", "interp.tasks"])
def test_core_imports_leave_heavy_libraries_alone(module, brought_by_transformers):
    brought = top_level_modules_after(module) - brought_by_transformers
    assert brought.isdisjoint(IMPORTED_WHERE_USED), brought & IMPORTED_WHERE_USED


def test_importing_prints_nothing():
    assert run_in_root("import interp, interp.model.load") == ""
