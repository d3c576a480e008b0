"""`roundel demo`: round the bundled model and measure what it cost. Needs no network and no model of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from torch import nn

    from roundel.calibration.tokenizer import Tokenizer

__all__ = ["demo"]

WINDOW = 256  # tokens; the length the bundled model was trained on
WRITTEN = 40  # tokens that each model adds to the prompt
SEED, TEMPERATURE = 2, 0.7  # of what the models write


@click.command(short_help="Quantize the bundled model and measure the result.")
@click.option("--scheme", default="W4A16", show_default=True, help="The scheme, as `roundel quantize` takes it.")
@click.option("--out", type=click.Path(path_type=Path), help="Keep the rounded model in this folder.")
@click.option("--prompt", default="It was a dark night, and", show_default=True, help="What both models continue.")
def demo(scheme: str, out: Path | None, prompt: str) -> None:
    """Round the model that comes with roundel, verify the files, and compare it with the original on a text of its own.

    \b
    Examples:
      roundel demo
      roundel demo --scheme W2A16G64 --prompt "The captain said"
    """
    from tempfile import TemporaryDirectory

    if out is not None:
        _run(scheme, out, prompt)
        click.echo(f"The rounded model is in {out}.")
        return
    with TemporaryDirectory(prefix="roundel-demo-") as folder:
        _run(scheme, Path(folder) / "tinybook-rounded", prompt)


def _run(scheme: str, out: Path, prompt: str) -> None:
    from rich.status import Status

    from roundel.api import quantize
    from roundel.calibration.tokenizer import load_tokenizer
    from roundel.checkpoint import open_checkpoint
    from roundel.cli.measuring import measured_table
    from roundel.cli.show import Bar, console
    from roundel.data.bundled import bundled_model
    from roundel.evaluation.measure import measure
    from roundel.evaluation.models import decoded_model, float_model

    source = bundled_model()
    with Status("rounding", console=console) as status:
        quantize(source, out, scheme=scheme)
        status.update("verifying")
        _verify(out, source)
    with Bar() as bar:
        found = measure([source, out], "bundled", window=WINDOW, names=("bfloat16", scheme), tick=bar.tick)
    console.print(measured_table(found))
    checkpoint = open_checkpoint(out)
    weights = {name: checkpoint.decode(name) for name in checkpoint.layers}
    checkpoint.close()
    console.print(f"{len(weights)} matrices rounded; the files were read back and hold what they should.\n")
    _write({"bfloat16": float_model(source), scheme: decoded_model(out, weights)}, load_tokenizer(source), prompt)


def _verify(out: Path, source: Path) -> None:
    """Raises VerificationError when the files do not hold what they should."""
    from roundel.errors import VerificationError
    from roundel.verification import verify

    problems = verify(out, against=source).problems
    if problems:
        raise VerificationError(f"{out} does not hold what it should: {problems[0]}. This is a bug of roundel's.")


def _write(models: dict[str, nn.Module], tokenizer: Tokenizer, prompt: str) -> None:
    """What each model makes of the prompt, drawn with the same random numbers."""
    from rich.markup import escape

    from roundel.cli.show import console
    from roundel.evaluation.models import continuation

    for name, model in models.items():
        written = continuation(model, tokenizer, prompt, WRITTEN, SEED, TEMPERATURE).replace("\n", " ")
        console.print(f"[bold]{escape(name)}[/]: [dim]{escape(prompt)}[/]{escape(written)}")
