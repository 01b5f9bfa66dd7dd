"""The command line, `interp ...`.

Heavy libraries are imported inside commands, so that `interp --help` answers at once.

Errors are one line on stderr; the exit code is 2 for bad input, 1 for a failure, 130 after Ctrl-C. `--debug`, anywhere
on the line, shows the traceback.
"""

from interp.cli import circuit_commands, commands, patching_commands, sae_commands, sae_reading, sink_commands
from interp.cli.app import app

__all__ = ["app", "circuit_commands", "commands", "patching_commands", "sae_commands", "sae_reading", "sink_commands"]
