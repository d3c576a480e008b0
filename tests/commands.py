"""The command line, run here or in a process of its own."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from dataclasses import dataclass

import pytest

from roundel.cli.main import main

__all__ = ["Outcome", "command", "process"]


@dataclass(frozen=True)
class Outcome:
    """Exit code, and what was printed, its lines joined: a narrow terminal breaks them anywhere."""

    code: int
    output: str
    error: str


def command(*arguments: object) -> Outcome:
    """`roundel ARGUMENTS` in this process."""
    output, error, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        patched.setattr(sys, "argv", ["roundel", *map(str, arguments)])
        try:
            main()
        except SystemExit as done:
            code = int(done.code or 0)
    return Outcome(code, _joined(output.getvalue()), _joined(error.getvalue()))


def process(*arguments: object) -> Outcome:
    """`python ARGUMENTS` in a process of its own."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    return Outcome(done.returncode, _joined(done.stdout), _joined(done.stderr))


def _joined(text: str) -> str:
    return " ".join(text.split())
