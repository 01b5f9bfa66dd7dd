"""Writing to a folder that outlives the process: by one job at a time, each file whole or not at all."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

PART = ".part"
"""Ending of what is being written; a killed job leaves it, under a name that begins with a dot."""


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Keep other jobs out of a folder. The lock is the system's: it goes with the process, however that ends.

    On Windows, and on file systems without locks, nobody is kept out.

    Raises:
        BlockingIOError: if another job is writing to the folder.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    opened = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = "another job is writing to this folder: wait until it is done, or give another one"
            raise BlockingIOError(errno.EWOULDBLOCK, what, str(out)) from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): see to it that one job at a time writes to it", out, error)
        yield
    finally:
        os.close(opened)


def replace_text(text: str, path: Path) -> None:
    """Write a text file, whole or not at all; what a killed call leaves, the next one takes away."""
    part = path.with_name(f".{path.name}{PART}")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)
