"""Output folders: what may be written where, files under their partial names, and the moment an output becomes a model.

An unfinished folder has a journal and no config.json, so nothing takes it for a model. config.json is written last.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from roundel.card import model_card, size
from roundel.errors import OutputError, SourceError
from roundel.io.journal import JOURNAL
from roundel.io.safetensors import Shard
from roundel.io.source import INDEX, Source, small_files
from roundel.page import PAGE, page, read_costs
from roundel.planning import Output, Plan
from roundel.recipe import Recipe
from roundel.report import LOG, REPORT, Report

__all__ = [
    "FRONTIER",
    "check_place",
    "clear",
    "finish",
    "folder_of",
    "is_complete",
    "is_intact",
    "open_shards",
    "prepare",
    "read_report",
]

CONFIG = "config.json"
_JOURNAL_NEW = "journal.new"  # all there is when the first instant of a run was its last
FRONTIER = ".frontier"  # ends the name of a file of activations
_CARDS = ("README.md", "recipe.json", REPORT, PAGE, LOG)
_WEIGHTS = (".safetensors", ".gguf", ".partial", FRONTIER)
_OURS = (CONFIG, "quantization_config.json", *_CARDS, INDEX, JOURNAL, _JOURNAL_NEW)


def folder_of(out: Path, recipe: Recipe, format: str) -> Path:
    """Where one of a recipe's formats goes: the folder itself, or a folder of its own where there are several."""
    return out if len(recipe.formats) == 1 else out / format.replace(":", "-")


def is_complete(out: Path, plan: Plan) -> bool:
    """Whether the folder holds the finished output of exactly this plan."""
    for output in plan.outputs:
        folder = folder_of(out, plan.recipe, output.format.name)
        if read_report(folder).get("fingerprint") != plan.fingerprint:
            return False
        if not (folder / CONFIG).is_file() or not all(_holds(folder / s.name, s.nbytes) for s in output.shards):
            return False
    return not (out / JOURNAL).exists()


def read_report(folder: Path) -> dict[str, object]:
    """The report of a written output; empty where there is none that can be read."""
    try:
        found = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def check_place(out: Path) -> None:
    """What can be said of an output folder before the model is looked at. Raises OutputError where none can be made."""
    place = next(path for path in (out.absolute(), *out.absolute().parents) if os.path.exists(path))
    if not place.is_dir():
        raise OutputError(f"{place} is a file. Choose a folder.")
    if place != out.absolute() and not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"{out} cannot be made: permission denied in {place}. Choose a folder you may write to.")


def prepare(out: Path, plan: Plan, source_folder: Path | None, overwrite: bool) -> None:
    """Check that the output may and can be written. Raises OutputError before anything is touched."""
    folders = _folders(out, plan)
    if source_folder is not None:
        _check_apart(folders, source_folder)
    check_place(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in out.iterdir()}
    except OSError as error:
        raise OutputError(f"{out} cannot be made: {error.strerror}. Choose a folder you may write to.") from error
    if not overwrite and JOURNAL not in found and not found <= {_JOURNAL_NEW}:
        raise OutputError(
            f"{out} is not empty and holds no unfinished run of roundel. Choose another folder, or pass "
            f"--overwrite to replace what is there."
        )
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file, and one format's folder. Choose another output folder.")
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"{folder} may not be written: permission denied. Choose a folder you may write to.")
    held = sum(f.stat().st_blocks * 512 for f in _ours(folders) if f.name not in _CARDS)  # these are written again
    free = shutil.disk_usage(out).free + held
    if free < plan.nbytes:
        raise OutputError(
            f"{out} has {size(free)} free and the output takes {size(plan.nbytes)}. Free "
            f"{size(plan.nbytes - free)} or choose another disk."
        )
    if overwrite:
        clear(out, plan)


def _check_apart(folders: Iterable[Path], source: Path) -> None:
    """Nothing is written over the source, nor among the files of it that travel along."""
    for folder in folders:
        if folder.resolve() == source.resolve():
            raise OutputError(f"{folder} is the source itself. Choose another output folder.")
        if folder.resolve().is_relative_to(source.resolve()):
            raise OutputError(f"{folder} lies in the source {source}. Choose an output folder outside of it.")


def clear(out: Path, plan: Plan) -> None:
    """Remove an earlier output: the files roundel writes, and weights under any name; nothing else."""
    order = {CONFIG: 0, JOURNAL: 2}  # whatever is left by a crash is no model, and is known to be ours
    for path in sorted(_ours(_folders(out, plan)), key=lambda path: order.get(path.name, 1)):
        path.unlink()


def is_intact(out: Path, plan: Plan, finished: Collection[str]) -> bool:
    """Whether the files that a journal of these finished works speaks of are there.

    Files have their final names only when all works are finished. A unit that follows a finished one needs the
    activations that enter it.
    """
    units = [work.name for work in plan.works if work.kind == "unit"]
    following = next((name for name in units if name not in finished), None)
    if following not in (None, *units[:1]):
        streams = ("quantized", "float") if plan.recipe.chain.reads_float_stream else ("quantized",)
        if not all((out / f"{following}.{stream}{FRONTIER}").is_file() for stream in streams):
            return False
    for output in plan.outputs:
        for shard in output.shards:
            path = folder_of(out, plan.recipe, output.format.name) / shard.name
            whole = len(finished) == len(plan.works) and _holds(path, shard.nbytes)
            begun = not path.exists() and (not finished or _holds(_partial(path), shard.nbytes))
            if not (whole or begun):
                return False
    return True


def _holds(path: Path, nbytes: int) -> bool:
    return path.is_file() and path.stat().st_size == nbytes


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _folders(out: Path, plan: Plan) -> list[Path]:
    return list(dict.fromkeys([out, *(folder_of(out, plan.recipe, output.format.name) for output in plan.outputs)]))


def _ours(folders: Iterable[Path]) -> list[Path]:
    """The files that roundel writes, and weights under any name."""
    return [
        path
        for folder in folders
        if folder.is_dir()
        for path in folder.iterdir()
        if path.is_file() and (path.name in _OURS or path.name.endswith(_WEIGHTS))
    ]


def open_shards(out: Path, plan: Plan) -> list[dict[str, Shard]]:
    """For each format, tensor name -> the open file it goes to. Files that have their final name already are left
    out."""
    opened: list[dict[str, Shard]] = []
    for output in plan.outputs:
        folder = folder_of(out, plan.recipe, output.format.name)
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise _failed(folder, error) from error
        by_tensor: dict[str, Shard] = {}
        for layout in output.shards:
            if (folder / layout.name).exists() and not (folder / (layout.name + ".partial")).exists():
                continue
            shard = Shard(folder, layout)
            by_tensor.update(dict.fromkeys((*layout.places, *layout.members), shard))
        opened.append(by_tensor)
    return opened


def finish(out: Path, plan: Plan, source: Source, report: Report) -> None:
    """Everything beside the weights, config.json last. Safe to repeat after a crash."""
    for number, output in enumerate(plan.outputs):
        folder = folder_of(out, plan.recipe, output.format.name)
        _copy_small_files(source, folder)
        if len(output.shards) > 1:
            index = {
                "metadata": {"total_size": sum(p.spec.nbytes for s in output.shards for p in s.places.values())},
                "weight_map": {name: s.name for s in output.shards for name in s.places},
            }
            _write(folder / INDEX, json.dumps(index, indent=2) + "\n")
        if output.config:
            _write(folder / "quantization_config.json", json.dumps(output.config, indent=2) + "\n")
        _write(folder / "recipe.json", json.dumps(plan.recipe.to_dict(), indent=2) + "\n")
        _write(folder / REPORT, report.to_json(number))
        _write(folder / PAGE, page(report, number, read_costs(out / LOG)))
        _write(folder / "README.md", model_card(plan, number))
    for folder in _folders(out, plan):
        _sync_folder(folder)
    for output in plan.outputs:
        folder = folder_of(out, plan.recipe, output.format.name)
        _write(folder / CONFIG, json.dumps(_config(source.config, output, plan.untied), indent=2) + "\n")
        _sync_folder(folder)
    for path in out.glob("*" + FRONTIER):
        path.unlink()
    (out / JOURNAL).unlink()
    _sync_folder(out)


def _config(config: Mapping[str, object], output: Output, untied: bool) -> dict[str, object]:
    """The source's config with this format's quantization in place of any other."""
    found = {k: v for k, v in config.items() if k not in ("quantization_config", "compression_config", "quantization")}
    if untied:
        found["tie_word_embeddings"] = False
        text = found.get("text_config")
        if isinstance(text, Mapping) and "tie_word_embeddings" in text:
            found["text_config"] = {**text, "tie_word_embeddings": False}
    return output.format.settings(found, output.config)


def _copy_small_files(source: Source, folder: Path) -> None:
    for name in small_files(source):
        try:
            path = source.files.fetch(name)
        except SourceError:
            if source.files.files[name] > 1 << 20:
                continue
            raise
        with _replaced(folder / name) as new, path.open("rb") as old:
            shutil.copyfileobj(old, new)


def _write(path: Path, text: str) -> None:
    with _replaced(path) as file:
        file.write(text.encode())


@contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when it is whole, and survives a power cut."""
    fresh = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise _failed(path, error) from error


def _failed(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path} cannot be written: {error.strerror}. Free the disk and repeat the same command to continue."
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise _failed(folder, error) from error
    finally:
        os.close(descriptor)
