"""`roundel eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from roundel.cli.measuring import MeasuringBar, measured_table, passage_options, print_notes, write_json

__all__ = ["eval_"]


@click.command("eval", short_help="Measure a model: perplexity, divergence from its source, tasks.")
@click.argument("model")
@click.option(
    "--ppl", "text", metavar="TEXT", help="Text to predict: a file, a dataset as --dataset takes it, 'bundled'."
)
@click.option("--kl-against", "source", metavar="MODEL", help="Compare predictions on that text with this model's.")
@click.option(
    "--per-position", type=click.Path(path_type=Path), metavar="FILE", help="Write every position to a .safetensors."
)
@passage_options
def eval_(
    model: str,
    text: str | None,
    source: str | None,
    per_position: Path | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Measure MODEL, a folder or a Hub id, quantized or not.

    It is run block by block from disk, so it may be larger than memory. With --kl-against, both models see the same
    tokens, and the difference has an error of its own, smaller than theirs.

    \b
    Examples:
      roundel eval ./out --ppl mytext.txt
      roundel eval ./out --ppl wikitext:split=test --kl-against ./model --limit 40
      roundel eval ./out --ppl chats.jsonl:apply_chat_template --window 1024 --stride 512 --json numbers.json
    """
    from roundel.cli.show import console
    from roundel.errors import RecipeError
    from roundel.evaluation.measure import measure

    if text is None:
        asked = "--kl-against compares predictions of a text" if source else "There is nothing to measure"
        raise RecipeError(f"{asked}: pass one with --ppl, such as --ppl mytext.txt or --ppl bundled.")
    with MeasuringBar() as bar:
        models = [model] if source is None else [source, model]
        found = measure(models, text, positions=per_position, tick=bar.tick, **options)
    print_notes(found.notes)
    console.print(measured_table(found))
    write_json(json_file, {"perplexity": found.to_dict()})
