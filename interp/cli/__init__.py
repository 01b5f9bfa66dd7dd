"""The command line, `interp ...`.

Errors are one line on stderr; the exit code is 2 for bad input, 1 for a failure, 130 after Ctrl-C. `--debug`, anywhere
on the line, shows the traceback.
"""

from interp.cli.commands import app

__all__ = ["app"]
