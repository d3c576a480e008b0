"""The public functions: plan and quantize."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from roundel.checkpoint import Checkpoint, open_checkpoint
from roundel.errors import RecipeError
from roundel.io.journal import alone, read_journal
from roundel.io.source import LocalFiles, small_files
from roundel.output import clear, is_complete, prepare, read_report
from roundel.pipeline import Demoted, Progress, default_workers, run
from roundel.planning import Plan, build_plan
from roundel.recipe import Recipe
from roundel.report import Report

__all__ = ["plan", "quantize", "quantize_checkpoint", "remove_downloads"]


def plan(model: str | Path, *, recipe: Recipe | None = None, revision: str | None = None, **wishes: object) -> Plan:
    """What `quantize` would do, without reading a weight.

    wishes   the fields of Recipe, when no recipe is given: scheme="W4A16", format="auto_round", layer_config={...} ...
    Raises RecipeError, PlanError or SourceError.
    """
    with tempfile.TemporaryDirectory(prefix="roundel-") as work:
        checkpoint = open_checkpoint(model, revision, Path(work))
        try:
            return build_plan(checkpoint, _recipe(recipe, wishes))
        finally:
            checkpoint.close()


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    revision: str | None = None,
    device: str = "cpu",
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **wishes: object,
) -> Report:
    """Round a model's weights and write a checkpoint.

    model     a folder, or a Hub id ("org/name")
    wishes    the fields of Recipe, when no recipe is given: scheme="W4A16", format="auto_round", layer_config={...} ...
    workers   pieces of work done side by side; None: as cores and memory allow. The output does not depend on it
    progress  called after each piece of work

    Call it again after a crash with the same arguments and it continues. Raises RecipeError, PlanError, OutputError,
    SourceError, or (with strict) NumericsError.
    """
    out, wish = Path(out), _recipe(recipe, wishes)
    work = downloads(out)
    checkpoint = open_checkpoint(model, revision, work)
    try:
        report = quantize_checkpoint(
            checkpoint, out, wish, device=device, workers=workers, overwrite=overwrite, progress=progress
        )
    finally:
        checkpoint.close()
    remove_downloads(work)
    return report


def remove_downloads(work: Path) -> None:
    """What was fetched from the Hub for a run is not needed once the run is done."""
    if (work / ".hub").is_dir():  # a folder of this name that is not ours stays
        shutil.rmtree(work)


def quantize_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    planned: Plan | None = None,
) -> Report:
    """`quantize` for a checkpoint that is open already. planned: its plan, where it was made already."""
    if workers is not None and workers < 1:
        raise RecipeError(f"workers={workers} is not possible: at least one is needed.")
    check_device(device)
    demoted = {} if overwrite else _demoted(out, recipe)
    made = planned if planned is not None and not demoted else build_plan(checkpoint, recipe, demoted)
    if not overwrite and is_complete(out, made):
        return Report(plan=made, folder=out, rows=(), seconds=0.0, already_complete=True)
    files = checkpoint.source.files
    for name in small_files(checkpoint.source) if isinstance(files, LocalFiles) else ():
        files.fetch(name)  # one that may not be read, or leaves the folder, shows before the first weight is read
    with ExitStack() as held:
        existed = os.path.isdir(out)  # False, not an error, where the folder above may not be read
        if existed:
            held.enter_context(alone(out))
        prepare(out, made, files.folder if isinstance(files, LocalFiles) else None, overwrite)
        if not existed:
            held.enter_context(alone(out))
        while True:
            try:
                return run(made, checkpoint, out, workers or default_workers(made, device), device, progress)
            except Demoted as error:
                if recipe.strict:
                    raise
                demoted = {**demoted, **{name: _short(text) for name, text in error.layers.items()}}
                clear(out, made)
                made = build_plan(checkpoint, recipe, demoted)


def check_device(device: str, planning: bool = False) -> None:
    """Raises RecipeError for a device that is unknown or, unless one is only planning, not there."""
    if device == "cpu":
        return
    if not device.startswith("cuda"):
        raise RecipeError(f"Unknown device {device!r}. Known are cpu and cuda.")
    if planning:
        return
    import torch

    if not torch.cuda.is_available():
        raise RecipeError(f"Device {device!r} is not there: torch sees no CUDA device. Use --device cpu.")


def downloads(out: Path) -> Path:
    """Where the shards of a Hub model lie while OUT is made: beside it."""
    out = out.resolve()
    return out.parent / f"{out.name}.download"


def _demoted(out: Path, recipe: Recipe) -> dict[str, str]:
    """Layers that the run which began or made this output found it cannot round."""
    begun = read_journal(out)
    head = begun[0] if begun is not None else read_report(out if len(recipe.formats) == 1 else out / recipe.formats[0])
    found = head.get("demoted")
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, Mapping) else {}


def _short(text: str) -> str:
    return "weights that cannot be rounded: " + text.partition(": ")[2].partition(". ")[0]


def _recipe(recipe: Recipe | None, wishes: Mapping[str, object]) -> Recipe:
    if recipe is not None:
        if wishes:
            raise RecipeError(f"A recipe is given and {', '.join(wishes)} beside it. Put them into the recipe.")
        return recipe
    clean = {k: v for k, v in wishes.items() if v is not None}
    if "format" in clean:
        clean["formats"] = clean.pop("format")
    return Recipe.from_dict(clean)
