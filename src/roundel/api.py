"""The public functions: plan, quantize and convert."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from roundel.calibrating import Calibration, Offload, Tick, calibration_of, check_calibration, importances_to, named
from roundel.chain import known_options
from roundel.checkpoint import Checkpoint, open_checkpoint
from roundel.errors import ConversionError, RecipeError
from roundel.io.journal import alone, read_journal
from roundel.io.source import LocalFiles, small_files
from roundel.output import check_place, clear, folder_of, is_complete, prepare, read_report
from roundel.pipeline import Demoted, default_workers, run
from roundel.planning import Plan, build_plan
from roundel.recipe import STORED, Recipe
from roundel.report import Progress, Report

if TYPE_CHECKING:
    from torch import nn

    from roundel.calibrating import Dataset

__all__ = [
    "check_device",
    "conversion_recipe",
    "convert",
    "downloads",
    "plan",
    "quantize",
    "quantize_checkpoint",
    "remove_downloads",
]


def plan(
    model: str | Path,
    *,
    recipe: Recipe | None = None,
    revision: str | None = None,
    dataset: Dataset | None = None,
    **wishes: object,
) -> Plan:
    """What `quantize` would do, without reading a weight.

    wishes    the fields of Recipe, when no recipe is given: scheme="W4A16", format="auto_round", layer_config={...} ...
    dataset   as `quantize` takes it; of a list no row is looked at
    Raises RecipeError, PlanError or SourceError.
    """
    wish = _recipe(recipe, wishes, dataset)
    check_calibration(wish, dataset)
    with tempfile.TemporaryDirectory(prefix="roundel-") as work:
        checkpoint = open_checkpoint(model, revision, Path(work))
        try:
            return build_plan(checkpoint, wish)
        finally:
            checkpoint.close()


def quantize(
    model: str | Path | nn.Module,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    revision: str | None = None,
    device: str = "cpu",
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    dataset: Dataset | None = None,
    offload: Offload = "auto",
    trust_remote_code: bool = False,
    tick: Tick | None = None,
    save_imatrix: str | Path | None = None,
    **wishes: object,
) -> Report:
    """Round a model's weights and write a checkpoint.

    model     a folder, a Hub id ("org/name"), or a live model of transformers, which is saved to a folder first
    wishes    the fields of Recipe, when no recipe is given: scheme="W4A16", format="auto_round", layer_config={...},
              algorithm="gptq" or Gptq(damping=0.05) or [Awq(), "gptq"], and hyperparameters by name: iters=50 ...
    dataset   where the algorithm looks at data: a name or path as `--dataset` takes it, or a list of texts or token
              ids; it takes the place of a recipe's
    offload   where activations lie between blocks: "ram", "disk", or "auto"
    trust_remote_code   whether code that ships inside the checkpoint may run
    tick      told how far a decoder block is: (name, 0 to 1, text)
    save_imatrix   a file for the importances that the algorithm computes, as llama.cpp reads them (.dat: its older
              layout)
    workers   pieces of work done side by side; None: as cores and memory allow. The output does not depend on it
    progress  called after each piece of work

    Call it again after a crash with the same arguments and it continues. Raises RecipeError, PlanError, OutputError,
    SourceError, or (with strict) NumericsError.
    """
    out = Path(out)
    check_place(out)
    wish = _recipe(recipe, wishes, dataset)
    target = importances_to(wish, save_imatrix)
    work = downloads(out)
    with ExitStack() as held:
        checkpoint = open_checkpoint(_saved(model, held), revision, work)
        held.callback(checkpoint.close)
        calibration = (
            calibration_of(
                checkpoint,
                wish,
                dataset,
                offload=offload,
                trust_remote_code=trust_remote_code,
                tick=tick,
                importances_to=target,
            )
            if wish.reads_activations
            else None
        )
        report = quantize_checkpoint(
            checkpoint,
            out,
            wish,
            device=device,
            workers=workers,
            overwrite=overwrite,
            progress=progress,
            calibration=calibration,
        )
    remove_downloads(work)
    return report


def convert(
    model: str | Path,
    out: str | Path,
    *,
    format: str,
    requantize: bool = False,
    scheme: str | None = None,
    shard_size: str | int | None = None,
    revision: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Move a quantized checkpoint to another format, number for number.

    requantize   layers whose numbers the format does not hold are rounded anew, from what they decode to
    scheme       what all layers are to be on; None: what each is on, or what holds the same numbers

    Call it again after a crash with the same arguments and it continues. Raises RecipeError, PlanError, OutputError,
    SourceError; ConversionError where numbers, once they are read, do not fit and may not be rounded.
    """
    out = Path(out)
    recipe, work = conversion_recipe(format, scheme, requantize, shard_size), downloads(out)
    checkpoint = open_checkpoint(model, revision, work)
    try:
        report = quantize_checkpoint(checkpoint, out, recipe, workers=workers, overwrite=overwrite, progress=progress)
    finally:
        checkpoint.close()
    remove_downloads(work)
    return report


def conversion_recipe(
    format: str, scheme: str | None = None, requantize: bool = False, shard_size: str | int | None = None
) -> Recipe:
    """The recipe of a conversion. Raises RecipeError."""
    found: dict[str, object] = {"formats": format, "scheme": scheme or STORED}
    found["conversion"] = "requantize" if requantize else "exact"
    return Recipe.from_dict(found | ({} if shard_size is None else {"shard_size": shard_size}))


def _saved(model: str | Path | nn.Module, held: ExitStack) -> str | Path:
    """A live model as a folder that lasts as long as `held`."""
    if isinstance(model, (str, Path)):
        return model
    save = getattr(model, "save_pretrained", None)
    if save is None:
        raise RecipeError(
            f"A {type(model).__name__} is neither a folder, a Hub id, nor a model of transformers. Save it with "
            "save_pretrained and pass the folder."
        )
    folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="roundel-model-"))) / _name_of(model)
    save(folder)
    return folder


def _name_of(model: nn.Module) -> str:
    """What a live model is called, in every run the same: as what it was loaded from, or by its type."""
    config = getattr(model, "config", None)
    names = (Path(str(getattr(config, "_name_or_path", ""))).name, str(getattr(config, "model_type", "")))
    clean = (re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip(".-")[:100] for name in names)
    return next((name for name in clean if name), "model")


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
    calibration: Calibration | None = None,
) -> Report:
    """`quantize` for a checkpoint that is open already. planned: its plan, where it was made already."""
    if workers is not None and workers < 1:
        raise RecipeError(f"workers={workers} is not possible: at least one is needed.")
    check_device(device)
    demoted = {} if overwrite else _demoted(out, recipe)
    seen = (calibration.sha256, calibration.notes) if calibration is not None else None
    made = planned if planned is not None and not demoted else build_plan(checkpoint, recipe, demoted, seen)
    target = calibration.importances_to if calibration is not None else None
    if not overwrite and is_complete(out, made):
        if target is not None and not target.exists():
            raise RecipeError(f"{out} is complete already, and {target} is not there: repeat with --overwrite.")
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
                return run(
                    made, checkpoint, out, workers or default_workers(made, device), device, progress, calibration
                )
            except ConversionError:
                clear(out, made)  # what was moved until then would be in the way of the next wish
                raise
            except Demoted as error:
                if recipe.strict or recipe.conversion is not None:
                    raise
                demoted |= _reasons(error)
                clear(out, made)
                made = build_plan(checkpoint, recipe, demoted, seen)


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
    head = begun[0] if begun is not None else read_report(folder_of(out, recipe, recipe.formats[0]))
    found = head.get("demoted")
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, Mapping) else {}


def _reasons(error: Demoted) -> dict[str, str]:
    return {name: f"weights that cannot be rounded: {each.reason}" for name, each in error.layers.items()}


def _recipe(recipe: Recipe | None, wishes: Mapping[str, object], dataset: Dataset | None) -> Recipe:
    if recipe is not None:
        if wishes:
            raise RecipeError(f"A recipe is given and {', '.join(wishes)} beside it. Put them into the recipe.")
        return recipe if dataset is None else replace(recipe, dataset=named(dataset))
    clean = {k: v for k, v in wishes.items() if v is not None}
    if dataset is not None:
        clean["dataset"] = named(dataset)
    if "format" in clean:
        clean["formats"] = clean.pop("format")
    own = {f.name for f in fields(Recipe)}
    loose = {key: clean.pop(key) for key in list(clean) if key not in own and key in known_options()}
    if loose:
        clean["options"] = {**loose, **dict(clean.get("options", {}))}  # type: ignore[call-overload]
    return Recipe.from_dict(clean)
