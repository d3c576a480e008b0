"""`roundel compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from roundel.cli.measuring import compared_table, passage_options, print_notes, write_file, write_json

__all__ = ["compare"]


@click.command(short_help="Compare models: size, perplexity, divergence, speed.")
@click.argument("models", nargs=-1, required=True)
@click.option("--ppl", "text", metavar="TEXT", required=True, help="Text to predict, as `roundel eval` takes it.")
@click.option("--source", metavar="MODEL", help="Compare predictions with this model's. [default: the first]")
@click.option(
    "--html", "html_file", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with plots to this file."
)
@passage_options
def compare(
    models: tuple[str, ...],
    text: str,
    source: str | None,
    html_file: Path | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Measure MODELS, folders or Hub ids, on the same tokens of a text, each from disk, block by block.

    \b
    Examples:
      roundel compare ./model ./out-w4 ./out-w3 --ppl mytext.txt
      roundel compare ./out-* --source ./model --ppl wikitext:split=test --limit 40 --html comparison.html
    """
    from roundel.cli.show import Bar, console
    from roundel.errors import RecipeError
    from roundel.evaluation.comparison_page import comparison_page
    from roundel.evaluation.measure import measure

    everyone = models
    if source is not None and not _same(source, models[0]):
        everyone = (source, *(model for model in models if not _same(source, model)))
    if len(everyone) < 2:
        raise RecipeError("There is nothing to compare with. Name two models or more, or a --source.")
    with Bar() as bar:
        found = measure(everyone, text, tick=bar.tick, **options)
    print_notes(found.notes)
    console.print(compared_table(found))
    write_json(json_file, found.to_dict())
    if html_file is not None:
        write_file(html_file, comparison_page(found))


def _same(one: str, other: str) -> bool:
    """Whether both name one folder, or one model on the Hub."""
    return Path(one).resolve() == Path(other).resolve()
