"""Running `interp ...` in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from interp.cli import app


def run(*words: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


def refused(*words: object, code: int = 2) -> str:
    """The message of a command line that must fail with one line on stderr and nothing on stdout."""
    exit_code, out, err = run(*words)
    assert exit_code == code, (out, err)
    assert out == ""
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert err.startswith("interp: ")
    return err
