"""`roundel generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from roundel.cli.running import drawing_options, write

if TYPE_CHECKING:
    from roundel.inference.drawing import Drawing

__all__ = ["generate"]


@click.command(short_help="Continue a prompt with a checkpoint.")
@click.argument("path")
@click.argument("prompt")
@drawing_options
def generate(prompt: str, drawing: Drawing, load: Callable[[], tuple[Any, Any]]) -> None:
    """Write what the checkpoint at PATH (a folder or a Hub id, rounded or not) makes of PROMPT, as it comes.

    \b
    Examples:
      roundel generate ./out "It was a dark night, and"
      roundel generate ./out "The captain said" --temperature 0.7 --seed 1
    """
    from roundel.inference.text import continued

    model, tokenizer = load()
    write(prompt)
    continued(model, tokenizer, prompt, write, drawing)
    write("\n")
