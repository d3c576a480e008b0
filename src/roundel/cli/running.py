"""What `roundel generate`, `roundel chat` and `roundel serve` share: how a checkpoint is loaded, and how its tokens are
drawn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from roundel.inference.drawing import Drawing

__all__ = ["drawing_options", "loaded", "write"]


def drawing_options(command: Callable[..., None]) -> Callable[..., None]:
    """What a command with a `path` needs to write text, given to it as `drawing` and `load`, which returns the
    model and its tokenizer."""
    options = (
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, xpu."),
        click.option("--backend", help="What multiplies by rounded weights; chosen by itself unless named."),
        click.option(
            "--max-new-tokens", "tokens", type=int, default=Drawing.tokens, show_default=True, help="Written at most."
        ),
        click.option(
            "--temperature", type=float, help="0 for the likeliest tokens; as the checkpoint says by default."
        ),
        click.option("--top-p", type=float, help="Draw among the likeliest tokens of this probability together."),
        click.option("--seed", type=int, help="For the same text each time."),
        click.option("--trust-remote-code", is_flag=True, help="Run code that ships inside the checkpoint."),
    )

    @wraps(command)
    def run(
        path: str,
        device: str,
        backend: str | None,
        tokens: int,
        temperature: float | None,
        top_p: float | None,
        seed: int | None,
        trust_remote_code: bool,
        **own: Any,
    ) -> None:
        drawing = Drawing(tokens=tokens, temperature=temperature, top_p=top_p, seed=seed)
        command(**own, drawing=drawing, load=lambda: loaded(path, device, backend, trust_remote_code))

    for option in reversed(options):
        run = option(run)
    return run


def loaded(path: str, device: str, backend: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    import warnings

    from rich.console import Console
    from rich.markup import escape

    from roundel.cli.show import Bar
    from roundel.inference.loading import load
    from roundel.inference.text import tokenizer_for

    console = Console(stderr=True)  # what is written goes to the output alone
    with warnings.catch_warnings(record=True) as notes, Bar(console) as bar:
        model = load(path, device=device, backend=backend, trust_remote_code=trust_remote_code, tick=bar.tick)
    for note in notes:
        if note.category is UserWarning:
            console.print(f"[yellow]note[/] {escape(str(note.message))}")
        else:
            warnings.warn_explicit(note.message, note.category, note.filename, note.lineno)
    return model, tokenizer_for(path, model, trust_remote_code=trust_remote_code)


def write(text: str) -> None:
    """A piece of text, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
