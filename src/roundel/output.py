"""Output folders: what may be written where, files under their partial names, and the moment an output becomes a model.

An unfinished folder has a journal and no config.json, so nothing takes it for a model. config.json is written last.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from roundel.card import model_card, size
from roundel.errors import OutputError, SourceError
from roundel.io.journal import JOURNAL
from roundel.io.safetensors import Shard
from roundel.io.source import INDEX, Source, small_files
from roundel.planning import Output, Plan
from roundel.report import REPORT, Report

__all__ = ["clear", "finish", "folder_of", "is_complete", "open_shards", "prepare"]

CONFIG = "config.json"
_OURS = (CONFIG, "quantization_config.json", "README.md", "recipe.json", REPORT, INDEX, JOURNAL, "journal.new")


def folder_of(out: Path, plan: Plan, output: Output) -> Path:
    """Where one format goes: the folder itself, or a folder of its own where there are several."""
    return out if len(plan.outputs) == 1 else out / output.format.name


def is_complete(out: Path, plan: Plan) -> bool:
    """Whether the folder holds the finished output of exactly this plan."""
    for output in plan.outputs:
        folder = folder_of(out, plan, output)
        try:
            report = json.loads((folder / REPORT).read_text())
        except (OSError, ValueError):
            return False
        files = [CONFIG, *(s.name for s in output.shards)]
        if report.get("fingerprint") != plan.fingerprint or not all((folder / f).is_file() for f in files):
            return False
    return not (out / JOURNAL).exists()


def prepare(out: Path, plan: Plan, source_folder: Path | None, overwrite: bool) -> None:
    """Check that the output may and can be written. Raises OutputError before anything is touched."""
    if source_folder is not None and out.resolve() == source_folder.resolve():
        raise OutputError(f"{out} is the source itself. Choose another output folder.")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file. Choose a folder.")
    begun = (out / JOURNAL).exists()
    if out.is_dir() and any(out.iterdir()) and not begun and not overwrite:
        raise OutputError(
            f"{out} is not empty and holds no unfinished run of roundel. Choose another folder, or pass "
            f"--overwrite to replace what is there."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be made: {error.strerror}. Choose a folder you may write to.") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise OutputError(f"{out} may not be written: permission denied. Choose a folder you may write to.")
    if overwrite:
        clear(out, plan)
    held = sum(f.stat().st_blocks * 512 for f in out.rglob("*.partial"))
    free = shutil.disk_usage(out).free + held
    if free < plan.nbytes:
        raise OutputError(
            f"{out} has {size(free)} free and the output takes {size(plan.nbytes)}. Free "
            f"{size(plan.nbytes - free)} or choose another disk."
        )


def clear(out: Path, plan: Plan) -> None:
    """Remove an earlier output: the files roundel writes, and weights under any name; nothing else."""
    for folder in {out, *(folder_of(out, plan, o) for o in plan.outputs)}:
        if folder.is_dir():
            (folder / CONFIG).unlink(missing_ok=True)  # first, so that what is left is no model
            for path in folder.iterdir():
                if path.is_file() and (path.name in _OURS or path.name.endswith((".safetensors", ".partial"))):
                    path.unlink()


def open_shards(out: Path, plan: Plan) -> list[dict[str, Shard]]:
    """For each format, tensor name -> the open file it goes to. Files that have their final name already are left
    out."""
    opened: list[dict[str, Shard]] = []
    for output in plan.outputs:
        folder = folder_of(out, plan, output)
        folder.mkdir(exist_ok=True)
        by_tensor: dict[str, Shard] = {}
        for layout in output.shards:
            if (folder / layout.name).exists() and not (folder / (layout.name + ".partial")).exists():
                continue
            shard = Shard(folder, layout)
            by_tensor.update(dict.fromkeys(layout.places, shard))
        opened.append(by_tensor)
    return opened


def finish(out: Path, plan: Plan, source: Source, report: Report) -> None:
    """Everything beside the weights, config.json last. Safe to repeat after a crash."""
    for number, output in enumerate(plan.outputs):
        folder = folder_of(out, plan, output)
        _copy_small_files(source, folder)
        if len(output.shards) > 1:
            index = {
                "metadata": {"total_size": sum(p.spec.nbytes for s in output.shards for p in s.places.values())},
                "weight_map": {name: s.name for s in output.shards for name in s.places},
            }
            _write(folder / INDEX, json.dumps(index, indent=2) + "\n")
        _write(folder / "quantization_config.json", json.dumps(output.config, indent=2) + "\n")
        _write(folder / "recipe.json", json.dumps(plan.recipe.to_dict(), indent=2) + "\n")
        _write(folder / REPORT, report.to_json(number))
        _write(folder / "README.md", model_card(plan, number))
    _sync_folder(out)
    for output in plan.outputs:
        folder = folder_of(out, plan, output)
        _write(folder / CONFIG, json.dumps(_config(source.config, output, plan.untied), indent=2) + "\n")
        _sync_folder(folder)
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
    return {**found, "quantization_config": output.config}


def _copy_small_files(source: Source, folder: Path) -> None:
    for name in small_files(source):
        try:
            path = source.files.fetch(name)
        except SourceError:
            if source.files.files[name] > 1 << 20:
                continue
            raise
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(target.name + ".new")
        shutil.copyfile(path, fresh)
        fresh.replace(target)


def _write(path: Path, text: str) -> None:
    """Replace a file whole, and make it survive a power cut."""
    fresh = path.with_name(path.name + ".new")
    try:
        with fresh.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror}. Free the disk and repeat the same command to continue."
        ) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
