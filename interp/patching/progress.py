"""Progress bars on anything long: on in a terminal or notebook, off elsewhere unless asked for."""

from __future__ import annotations

import sys

from tqdm.auto import tqdm


def progress_bar(total: int, description: str, unit: str, *, progress: bool | None, done: int = 0) -> tqdm:
    """A bar to be used as a context and moved on with `update`.

    Args:
        total: how many steps there are.
        description: what is being done.
        unit: what a step is.
        progress: whether to show it; None: in a terminal or notebook only.
        done: steps taken before, which tell nothing of the time that others take.
    """
    shown = (sys.stderr.isatty() or in_notebook()) if progress is None else progress
    hidden = not shown or total == 0
    return tqdm(total=total, desc=description, unit=unit, leave=False, disable=hidden, initial=done)


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook, whose output is no terminal and yet has a reader."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"
