"""`roundel convert`."""

from __future__ import annotations

import json
from pathlib import Path

import click

__all__ = ["convert"]


@click.command(short_help="Move a quantized checkpoint to another format.")
@click.argument("model")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option("--format", "format_", metavar="NAME", required=True, help="Format to write.")
@click.option(
    "--requantize",
    is_flag=True,
    help="Round layers anew whose numbers the format does not hold, and report what that costs. Without it, they are "
    "refused.",
)
@click.option("--scheme", metavar="NAME", help="What all layers are to be on. [default: what holds the same numbers]")
@click.option("--dry-run", is_flag=True, help="Show what would happen, without reading a weight; OUT may be left out.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: the whole plan as JSON.")
@click.option("--shard-size", metavar="SIZE", help="Largest output file. [default: 5GB]")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run left in OUT.")
@click.option("--revision", metavar="REV", help="Hub branch, tag or commit.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Layers converted side by side. [default: as cores and memory allow]",
)
def convert(
    model: str,
    out: Path | None,
    format_: str,
    requantize: bool,
    scheme: str | None,
    dry_run: bool,
    as_json: bool,
    shard_size: str | None,
    overwrite: bool,
    revision: str | None,
    workers: int | None,
) -> None:
    """Move MODEL, a quantized checkpoint of any format that roundel reads, to another format, into OUT.

    Codes, scales and zero points move where the format holds the same numbers: what its readers compute is equal, bit
    for bit, and that is checked on every layer. What cannot move is refused before any work, with the reason; what only
    the numbers tell stops the run at its layer. OUT is ./NAME-FORMAT when it is left out. A killed run continues when
    the same command is repeated, and ends with the same bytes.

    \b
    Examples:
      roundel convert ./Qwen3-8B-GPTQ ./out --format auto_awq
      roundel convert ./out ./for-mac --format mlx
      roundel convert ./model-mlx ./out --format llm_compressor --requantize
      roundel convert ./gpt-oss-20b --format llm_compressor --dry-run
      roundel convert ./model-nf4 ./out --format auto_round --scheme W4A16G64 --requantize
    """
    from rich.markup import escape

    from roundel.api import conversion_recipe, downloads, quantize_checkpoint, remove_downloads
    from roundel.checkpoint import open_checkpoint
    from roundel.cli.plan import plan_as_dict
    from roundel.cli.quantize import LayersBar, default_folder
    from roundel.cli.show import console, print_plan, print_report
    from roundel.output import is_complete
    from roundel.pipeline import default_workers
    from roundel.planning import build_plan

    recipe = conversion_recipe(format_, scheme, requantize, shard_size)
    folder = out if out is not None else default_folder(model, recipe.formats[0].replace(":", "-"))
    work = downloads(folder)
    checkpoint = open_checkpoint(model, revision, work)
    try:
        plan = build_plan(checkpoint, recipe)
        count = workers or default_workers(plan)
        if dry_run and as_json:
            click.echo(json.dumps(plan_as_dict(plan, count, "cpu"), indent=1))
        elif dry_run:
            print_plan(plan, count, "cpu")
        else:
            if not is_complete(folder, plan):
                console.print(
                    f"{escape(plan.source_name)} to {recipe.formats[0]}: {plan.extent}, into {escape(str(folder))}"
                )
            with LayersBar(sum(layer.parameters for layer in plan.layers), len(plan.layers)) as bar:
                report = quantize_checkpoint(
                    checkpoint,
                    folder,
                    recipe,
                    workers=count,
                    overwrite=overwrite,
                    progress=bar.advance,
                    planned=plan,
                )
    finally:
        checkpoint.close()
    remove_downloads(work)
    if not dry_run:
        print_report(report)
