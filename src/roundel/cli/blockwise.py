"""Options of commands that run a model block by block."""

from __future__ import annotations

import click

__all__ = ["BLOCKWISE"]

BLOCKWISE = (
    click.option(
        "--offload",
        type=click.Choice(["auto", "ram", "disk"]),
        default="auto",
        show_default=True,
        help="Where activations lie between blocks.",
    ),
    click.option("--trust-remote-code", is_flag=True, help="Let code that ships inside a checkpoint run."),
)
