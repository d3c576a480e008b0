"""What README.md, the documents and the help say to type is what the command line takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from roundel.cli.main import cli

ROOT = Path(__file__).parents[2]
HELP = sorted((ROOT / "src" / "roundel" / "cli").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ADDED_BY_THE_READER = "--algorithm clip"  # docs/adding_an_algorithm.md


def commands() -> Iterator[tuple[str, int, str]]:
    """(file, line, command) of every command that stands on a line of its own, without what is said behind it."""
    for path in (*PAGES, *HELP):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = re.match(r" {4,}roundel (?=[a-z])(.*)", line)
            if found and ADDED_BY_THE_READER not in line:
                yield str(path.relative_to(ROOT)), number, re.split(r" {2,}", found[1])[0]


COMMANDS = list(commands())


def test_they_are_found() -> None:
    assert {"README.md", "docs/datasets.md", "docs/formats.md", "src/roundel/cli/main.py"} <= {c[0] for c in COMMANDS}


@pytest.mark.parametrize(("file", "line", "text"), COMMANDS, ids=[f"{file}:{line}" for file, line, _ in COMMANDS])
def test_every_command_is_taken(file: str, line: int, text: str) -> None:
    name, *words = shlex.split(text)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, f"{file}:{line}: there is no command {name}"
    command.make_context(name, words)
