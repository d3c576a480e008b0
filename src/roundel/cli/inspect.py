"""`roundel inspect`."""

from __future__ import annotations

import json

import click

__all__ = ["inspect"]


@click.command(short_help="Show what a checkpoint is.")
@click.argument("path")
@click.option("--revision", metavar="REV", help="Hub branch, tag or commit.")
@click.option("--json", "as_json", is_flag=True, help="Print every matrix as JSON.")
def inspect(path: str, revision: str | None, as_json: bool) -> None:
    """Show what the checkpoint at PATH (a folder, a GGUF file or a Hub id) is: format, schemes, layers, sizes, bits per
    weight.

    \b
    Example:
      roundel inspect ./out
    """
    import tempfile
    from pathlib import Path

    from rich.markup import escape

    from roundel.card import size
    from roundel.checkpoint import open_checkpoint
    from roundel.cli.show import console, folded, table
    from roundel.inspection import inspect_checkpoint

    with tempfile.TemporaryDirectory(prefix="roundel-") as work:
        checkpoint = open_checkpoint(path, revision, Path(work))
        try:
            found = inspect_checkpoint(checkpoint)
        finally:
            checkpoint.close()
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=1))
        return
    packing = f" ({found.packing})" if found.packing else ""
    console.print(escape(f"{found.name}: {found.model_type}, family {found.family}, format {found.format}{packing}"))
    shown = table("matrices", "count", "shape", "stored as", "bits", "why not rounded")
    for pattern, count, cells in folded(
        (m.name, f"{m.shape[0]}×{m.shape[1]}", m.stored_as, f"{m.bits:.3f}", m.reason) for m in found.matrices
    ):
        shown.add_row(escape(pattern), str(count), *map(escape, cells))
    console.print(shown)
    for name, (layers, weights) in found.schemes.items():
        console.print(f"{name}: {layers} layers, {weights / 1e6:.1f} M weights")
    if found.kv_cache is not None:
        console.print(escape(f"keys and values in the cache: {found.kv_cache}"))
    if found.bits_per_weight is not None:
        console.print(f"{found.bits_per_weight:.3f} bits per quantized weight")
    console.print(f"{size(found.nbytes)} in {found.shards} file{'s' if found.shards > 1 else ''}")
