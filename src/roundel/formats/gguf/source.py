"""A GGUF file as a checkpoint: the tensors of a Hugging Face model, read from it.

What stands beside the file counts: a config.json of the same model (roundel writes one) and a tokenizer. What is
missing is made from the file's metadata, in a temporary folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from roundel.errors import SourceError
from roundel.formats.gguf.architectures import architecture_of, settings_of
from roundel.formats.gguf.configuration import configuration
from roundel.formats.gguf.metadata import COMPANIONS
from roundel.formats.gguf.reading import Held, architecture_in, held_tensors
from roundel.formats.gguf.tokenizer import tokenizer_files
from roundel.io.gguf import GgufHeader, read_gguf, read_tensor
from roundel.io.source import INDEX, JSON_LIMIT, LocalFiles, Source
from roundel.scheme import BLOCK_GRIDS
from roundel.unit import Piece

__all__ = ["GgufSource", "find_gguf", "open_gguf", "tokenizer_home"]

CONFIG = "config.json"
ENDING = ".gguf"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_BESIDE = (*(name for name in COMPANIONS if name != "README.md"), "special_tokens_map.json")
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_LISTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def find_gguf(model: str | Path) -> Path | None:
    """The GGUF file, or the first part of one, that is meant: the file itself, or the only one of a folder without
    safetensors. Raises SourceError where a folder has several."""
    try:
        path = Path(model).expanduser()
        if path.is_file():
            return path if path.suffix.lower() == ENDING else None
        if not path.is_dir() or not os.access(path, os.R_OK | os.X_OK):
            return None
        names = sorted(each.name for each in path.iterdir() if each.is_file())
    except (OSError, RuntimeError):
        return None
    found = [name for name in names if name.endswith(ENDING) and not name.startswith(("mmproj", "."))]
    unfinished = "journal.jsonl" in names and CONFIG not in names
    if not found or unfinished or INDEX in names or any(name.endswith(".safetensors") for name in names):
        return None
    first = [name for name in found if (part := _PART.fullmatch(name)) is None or int(part["number"]) == 1]
    if len(first) > 1:
        raise SourceError(f"{path} holds several GGUF files ({', '.join(first[:5])}). Pass one of them.")
    return path / (first or found)[0]


def open_gguf(path: Path) -> GgufSource:
    """Open a GGUF file. Raises SourceError when it is broken, or holds what is not read."""
    files = GgufFiles(path)
    try:
        return GgufSource(files)
    except BaseException:
        files.close()
        raise


@contextmanager
def tokenizer_home(model: str | Path) -> Iterator[str | Path]:
    """Where a model's tokenizer lies: the model itself, or what is made of a GGUF file, for as long as this lasts."""
    gguf = find_gguf(model)
    if gguf is None:
        yield model
        return
    with closing(open_gguf(gguf)) as source:
        yield source.small_folder()


class GgufFiles(LocalFiles):
    """A GGUF file (or its parts), the files beside it that count, and those that are made from its metadata.

    contents   the header of the whole model: the first part's values, all tensors
    part_of    tensor -> the name of the file it lies in
    made       name -> where a file lies that was made
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path.parent)
        parts = _parts_of(path)
        self.contents, self.part_of = _joined(parts)
        has_config = self._has_own_config()
        kept = [name for name in self.files if (not name.endswith(ENDING) if has_config else name in _BESIDE)]
        self.files = {name: self.files[name] for name in kept} | {part.name: part.stat().st_size for part in parts}
        lists = {name: self._values(name) for name in _LISTS if name in self.part_of}
        config = None if has_config else configuration(self.contents, lists)
        self._home = tempfile.TemporaryDirectory(prefix="roundel-gguf-")
        self.made: dict[str, Path] = {}
        self._is_complete = any(name in self.files for name in _TOKENIZERS)
        if config is not None:
            self._make(CONFIG, json.dumps(config, indent=2))

    def complete(self) -> None:
        """Make the files of a tokenizer, unless one lies beside; warn where the metadata do not tell enough."""
        if self._is_complete:
            return
        self._is_complete = True
        try:
            made = tokenizer_files(self.contents.metadata)
        except SourceError as error:
            warnings.warn(str(error), stacklevel=4)
            return
        for name, text in made.items():
            if name not in self.files:
                self._make(name, text)

    def fetch(self, name: str) -> Path:
        return self.made[name] if name in self.made else super().fetch(name)

    def small_folder(self) -> Path:
        """A folder with everything but the weights."""
        if not self.made:
            return self.folder
        home = Path(self._home.name)
        for name in self.files:
            if name not in self.made and not name.endswith(ENDING):
                (home / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(super().fetch(name), home / name)
        return home

    def close(self) -> None:
        self._home.cleanup()

    def _has_own_config(self) -> bool:
        """Whether the config.json beside the file describes what it holds; of a multimodal model that is a part."""
        if self.files.get(CONFIG, JSON_LIMIT + 1) > JSON_LIMIT:
            return False
        try:
            found = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
            return bool("text_config" not in found and architecture_of(found) == architecture_in(self.contents))
        except (OSError, ValueError, RecursionError, AttributeError, SourceError):
            return False

    def _values(self, name: str) -> np.ndarray:
        place = self.contents.places[name]
        if place.spec.dtype != "F32":
            raise SourceError(f"{name} of the GGUF file is {place.spec.dtype}, and F32 was expected. Fetch it again.")
        return read_tensor(self.folder / self.part_of[name], place).view("<f4")

    def _make(self, name: str, text: str) -> None:
        path = Path(self._home.name) / name
        path.write_text(text, encoding="utf-8")
        self.made[name], self.files[name] = path, path.stat().st_size


class GgufSource(Source):
    """The model that a GGUF file holds, by the names of a Hugging Face checkpoint."""

    files: GgufFiles

    def __init__(self, files: GgufFiles) -> None:
        self._held: dict[str, Held] = {}
        self._restored: dict[str, IO[bytes]] = {}
        super().__init__(files, files.folder.resolve().name if not files.made else next(iter(files.part_of.values())))
        kinds = {name: held.kind for name, held in self._held.items() if held.kind in BLOCK_GRIDS}
        types = {name.removesuffix(".weight"): kind for name, kind in kinds.items()}
        self.config = {**self.config, "quantization_config": {"quant_method": "gguf", "types": types}}

    def read(self, piece: Piece) -> np.ndarray:
        held = self._held[piece.tensor]
        if not held.is_changed:
            return super().read(piece)
        whole = held.restored(super().read(Piece(tensor=piece.tensor)).reshape(held.place.spec.shape[0], -1))
        if piece.step == 1 and not piece.transposed:
            whole = whole[piece.start : piece.stop]
        return np.ascontiguousarray(whole).reshape(-1)

    def read_rows(self, piece: Piece, start: int, into: np.ndarray) -> None:
        held = self._held[piece.tensor]
        if not held.is_changed:
            super().read_rows(piece, start, into)
            return
        rows, row_bytes = held.place.spec.shape[0], held.place.spec.nbytes // held.place.spec.shape[0]
        size = held.heads[1] if held.heads is not None else 1
        first, count = piece.start + start, into.nbytes // row_bytes
        begin, end = first // size * size, min(rows, -(-(first + count) // size) * size)  # whole heads
        slab = np.empty((end - begin, row_bytes), np.uint8)
        super().read_rows(Piece(tensor=piece.tensor), begin, slab)
        into.reshape(-1)[:] = held.restored(slab)[first - begin :][:count].reshape(-1)

    def mapped(self, name: str) -> np.ndarray:
        return self.read(Piece(tensor=name)) if self._held[name].is_changed else super().mapped(name)

    def place(self, name: str) -> tuple[int, int]:
        if not self._held[name].is_changed:
            return super().place(name)
        data = self.read(Piece(tensor=name))
        with self._lock:
            if name not in self._restored:
                file = tempfile.TemporaryFile(prefix="roundel-gguf-")  # noqa: SIM115 - open as long as the source is
                file.write(data.data)
                file.flush()
                self._restored[name] = file
            return self._restored[name].fileno(), 0

    def all_files(self) -> Mapping[str, int]:
        self.files.complete()
        return self.files.files

    def small_folder(self) -> Path:
        self.files.complete()
        return self.files.small_folder()

    def close(self) -> None:
        for file in self._restored.values():
            file.close()
        self._restored.clear()
        super().close()

    def _open_shards(self) -> None:
        self._held = held_tensors(self.files.contents, settings_of(self.config))
        for name, held in self._held.items():
            self._places[name] = self.files.part_of[held.tensor], held.place


def _parts_of(path: Path) -> list[Path]:
    """All files of a model that is split. Raises SourceError where one is missing."""
    first = _PART.fullmatch(path.name)
    if first is None:
        return [path]
    parts = [
        path.with_name(f"{first['stem']}-{n:05d}-of-{first['count']}.gguf") for n in range(1, int(first["count"]) + 1)
    ]
    missing = [part.name for part in parts if not part.is_file()]
    if missing or not parts:
        raise SourceError(f"{path.name} lacks {len(missing)} of its {len(parts)} parts: {', '.join(missing[:5])}.")
    return parts


def _joined(parts: Sequence[Path]) -> tuple[GgufHeader, dict[str, str]]:
    """The header of a whole model, and the file of each tensor."""
    headers = {part.name: read_gguf(part) for part in parts}
    part_of: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.tensors:
            if name in part_of:
                raise SourceError(f"Tensor {name!r} lies in both {part_of[name]} and {file}. Fetch the model again.")
            part_of[name] = file
    tensors = {name: headers[file].tensors[name] for name, file in part_of.items()}
    places = {name: headers[file].places[name] for name, file in part_of.items()}
    return GgufHeader(headers[parts[0].name].metadata, tensors, places), part_of
