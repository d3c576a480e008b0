"""`roundel generate`."""

from __future__ import annotations

import click

from roundel.cli.running import drawing_options

__all__ = ["generate"]


@click.command(short_help="Continue a prompt with a checkpoint.")
@click.argument("path")
@click.argument("prompt")
@drawing_options
def generate(
    path: str,
    prompt: str,
    device: str,
    backend: str | None,
    tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    trust_remote_code: bool,
) -> None:
    """Write what the checkpoint at PATH (a folder or a Hub id, rounded or not) makes of PROMPT, as it comes.

    \b
    Examples:
      roundel generate ./out "It was a dark night, and"
      roundel generate ./out "The captain said" --temperature 0.7 --seed 1
    """
    from roundel.cli.running import loaded, write
    from roundel.inference.text import Drawing, continued

    drawing = Drawing(tokens=tokens, temperature=temperature, top_p=top_p, seed=seed)
    model, tokenizer = loaded(path, device, backend, trust_remote_code)
    write(prompt)
    continued(model, tokenizer, prompt, write, drawing)
    write("\n")
