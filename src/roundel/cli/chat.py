"""`roundel chat`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from roundel.cli.running import drawing_options, write

if TYPE_CHECKING:
    from roundel.inference.drawing import Drawing

__all__ = ["chat"]


@click.command(short_help="Talk with a checkpoint.")
@click.argument("path")
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@drawing_options
def chat(system: str | None, drawing: Drawing, load: Callable[[], tuple[Any, Any]]) -> None:
    """Talk with the checkpoint at PATH (a folder or a Hub id, rounded or not) in its own chat template.

    An empty line, or the end of the input, ends the conversation.

    \b
    Example:
      roundel chat ./out --system "Answer in one sentence."
    """
    from roundel.inference.text import answered, check_template

    model, tokenizer = load()
    check_template(tokenizer)
    turns = [] if system is None else [{"role": "system", "content": system}]
    while said := _line():
        turns.append({"role": "user", "content": said})
        turns.append({"role": "assistant", "content": answered(model, tokenizer, turns, write, drawing)})
        write("\n")


def _line() -> str:
    """What the user says; the empty string at the end."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""
