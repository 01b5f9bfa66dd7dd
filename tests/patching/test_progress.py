"""Progress bars appear where somebody looks."""

import sys

import pytest

from interp.patching.progress import progress_bar


@pytest.mark.parametrize(
    ("progress", "terminal", "notebook", "shown"),
    [
        (None, False, False, False),
        (None, True, False, True),
        (None, False, True, True),
        (True, False, False, True),
        (False, True, True, False),
    ],
)
def test_a_bar_is_shown_in_a_terminal_a_notebook_or_on_request(monkeypatch, progress, terminal, notebook, shown):
    shell = type("ZMQInteractiveShell", (), {})() if notebook else None
    monkeypatch.setitem(sys.modules, "IPython", type("IPython", (), {"get_ipython": staticmethod(lambda: shell)}))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with progress_bar(3, "patching", "run", progress=progress) as bar:
        assert bar.disable is not shown
        assert bar.total == 3
