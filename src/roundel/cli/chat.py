"""`roundel chat`."""

from __future__ import annotations

import click

from roundel.cli.running import drawing_options

__all__ = ["chat"]


@click.command(short_help="Talk with a checkpoint.")
@click.argument("path")
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@drawing_options
def chat(
    path: str,
    system: str | None,
    device: str,
    backend: str | None,
    tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    trust_remote_code: bool,
) -> None:
    """Talk with the checkpoint at PATH (a folder or a Hub id, rounded or not) in its own chat template.

    An empty line, or the end of the input, ends the conversation.

    \b
    Example:
      roundel chat ./out --system "Answer in one sentence."
    """
    from roundel.cli.running import loaded, write
    from roundel.inference.text import Drawing, answered

    drawing = Drawing(tokens=tokens, temperature=temperature, top_p=top_p, seed=seed)
    model, tokenizer = loaded(path, device, backend, trust_remote_code)
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
