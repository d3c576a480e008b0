"""`roundel plan`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from roundel.cli.options import recipe_from, recipe_options

if TYPE_CHECKING:
    from roundel.planning import Plan

__all__ = ["plan", "plan_as_dict"]


@click.command(short_help="Show what quantize would do, without reading a weight.")
@click.argument("model")
@recipe_options
@click.option("--probe/--no-probe", default=True, help="Measure one block, to foresee the time of a calibrated run.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole plan as JSON: every layer, every output tensor.")
def plan(
    model: str,
    probe: bool,
    as_json: bool,
    offload: str,
    trust_remote_code: bool,
    revision: str | None,
    device: str,
    workers: int | None,
    **options: Any,
) -> None:
    """Show what `roundel quantize` would do to MODEL with the same options, without reading a weight.

    \b
    Examples:
      roundel plan ./model --scheme W4A16_MIXED
      roundel plan Qwen/Qwen3-8B --bits 3 --json
    """
    from roundel.api import check_device
    from roundel.calibrating import check_calibration
    from roundel.card import size
    from roundel.checkpoint import open_checkpoint
    from roundel.cli.show import console, duration, print_plan
    from roundel.estimate import estimate
    from roundel.memory import free_memory
    from roundel.pipeline import default_workers
    from roundel.planning import build_plan
    from roundel.planning.room import in_memory

    check_device(device, planning=True)
    recipe = recipe_from(options)
    check_calibration(recipe)
    with tempfile.TemporaryDirectory(prefix="roundel-") as work:
        checkpoint = open_checkpoint(model, revision, Path(work))
        try:
            made = build_plan(checkpoint, recipe)
            foreseen = estimate(made, checkpoint, trust_remote_code) if recipe.reads_activations and probe else None
        finally:
            checkpoint.close()
    count = workers or default_workers(made, device)
    held = foreseen is not None and in_memory(offload, foreseen.activations, free_memory())
    between = foreseen.activations if foreseen is not None and held else 0
    if as_json:
        told = plan_as_dict(made, count, device, between)
        if foreseen is not None:
            told |= {"activation_bytes": foreseen.activations, "estimated_seconds": round(foreseen.seconds, 1)}
        click.echo(json.dumps(told, indent=1))
    else:
        print_plan(made, count, device, between)
        if foreseen is not None:
            console.print(
                f"activations between blocks: {size(foreseen.activations)}, "
                f"{'in memory; in files with --offload disk' if held else 'in files'}\n"
                f"time about {duration(foreseen.seconds)}, foreseen from a probe of {foreseen.probe:.1f} s"
            )


def plan_as_dict(made: Plan, workers: int, device: str, between: int = 0) -> dict[str, object]:
    """Everything a plan knows, ready for JSON. between: bytes of activations that lie in memory between units."""
    from roundel.planning.room import expected_peak

    return {
        "source": made.source_name,
        "family": made.family,
        "fingerprint": made.fingerprint,
        "recipe": made.recipe.to_dict(),
        "bits_per_weight": made.bits_per_weight,
        "peak_memory_bytes": expected_peak(made, workers, device) + between,
        "workers": workers,
        "notes": list(made.notes),
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "scheme": layer.scheme.name,
                "bits": layer.scheme.bits,
                "group_size": layer.scheme.group_size,
                "sym": layer.scheme.weight.symmetric,
                "origin": made.origins[layer.name],
            }
            for layer in made.layers
        ],
        "kept": [{"name": k.name, "shape": list(k.shape), "dtype": k.dtype, "reason": k.reason} for k in made.kept],
        "outputs": [
            {
                "format": o.format.name,
                "bytes": o.nbytes,
                "config": o.config,
                "files": [
                    {
                        "name": s.name,
                        "bytes": s.nbytes,
                        "tensors": [
                            {
                                "name": n,
                                "dtype": p.spec.dtype,
                                "shape": list(p.spec.shape),
                                "begin": p.begin,
                                "end": p.end,
                            }
                            for n, p in s.places.items()
                        ],
                    }
                    for s in o.shards
                ],
            }
            for o in made.outputs
        ],
    }
