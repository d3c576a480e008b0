"""A checkpoint as it lies in a folder or on the Hub: its config, its tensors' specs, and their bytes on request.

Opening reads configs and shard headers, never weights. Shards are fetched when first read and dropped when the plan has
no further use for them. Nothing in a checkpoint is executed or unpickled; paths that leave its folder are refused.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from roundel.errors import SourceError
from roundel.io.safetensors import Place, parse_header, raw_header
from roundel.unit import Piece

__all__ = ["INDEX", "JSON_LIMIT", "Files", "LocalFiles", "Source", "open_source", "small_files"]

SAMPLES, SAMPLE_BYTES = 16, 4096  # of a shard, by which a local checkpoint is known again
INDEX = "model.safetensors.index.json"
JSON_LIMIT = 256_000_000  # bytes; a config or index beyond this is no config
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Files(Protocol):
    """Where the files of a checkpoint come from: a folder, or one revision on the Hub."""

    files: dict[str, int]

    def header(self, name: str) -> bytes: ...
    def stamp(self, name: str) -> str: ...
    def fetch(self, name: str) -> Path: ...
    def prefetch(self, name: str) -> None: ...
    def drop(self, name: str) -> None: ...
    def close(self) -> None: ...


class LocalFiles:
    """The files of a folder, where nothing needs fetching and nothing is ever dropped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, int] = {}
        try:
            for path in sorted(folder.rglob("*")):
                name = path.relative_to(folder).as_posix()
                if not path.is_file() or name.startswith(".") or "/." in name:
                    continue
                self.files[name] = path.stat().st_size
        except PermissionError as error:
            raise SourceError(
                f"{error.filename} may not be read: permission denied. Check the folder's rights."
            ) from error

    def header(self, name: str) -> bytes:
        return raw_header(self.fetch(name))

    def fetch(self, name: str) -> Path:
        check_inside(name)
        path = self.folder / name
        if not path.exists():
            raise SourceError(f"{name} is missing from {self.folder}. Fetch or copy the checkpoint again.")
        resolved, home = path.resolve(), self.folder.resolve()
        allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
        if not any(resolved.is_relative_to(a) for a in allowed):
            raise SourceError(
                f"{name} is a link that leaves {self.folder}. Copy the file it points to into the folder."
            )
        if not os.access(path, os.R_OK):
            raise SourceError(f"{path} may not be read: permission denied. Check the file's rights.")
        return path

    def stamp(self, name: str) -> str:
        """sha256 of a few evenly spaced samples: equal for a copy, another for a finetune of the same layout."""
        digest, size = hashlib.sha256(), self.files[name]
        with (self.folder / name).open("rb", buffering=0) as file:
            for begin in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
                file.seek(begin)
                digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()

    def prefetch(self, name: str) -> None:
        """Nothing to do: the file is here."""

    def drop(self, name: str) -> None:
        """Nothing to do: the file is the user's."""

    def close(self) -> None:
        """Nothing is held."""


def check_inside(name: str) -> None:
    """Raises SourceError for a file name that leaves its checkpoint's folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise SourceError(
            f"The checkpoint names the file {name!r}, which leaves its folder. Do not trust this checkpoint."
        )


def is_weight_file(name: str) -> bool:
    """Whether a file holds weights (of any kind, pickles too) or lists them, and so never travels along."""
    return name.endswith(
        (".safetensors", ".safetensors.index.json", ".gguf", ".h5", ".msgpack", ".onnx", ".bin.index.json", *_PICKLES)
    )


class Source:
    """An opened checkpoint. Safe to read from several threads.

    config    config.json as a dict
    tensors   name -> TensorSpec of every tensor, in shard order
    name      the folder's name or the Hub id: what people call it
    revision  the Hub commit it is pinned to; None for a folder
    """

    def __init__(self, files: Files, name: str, revision: str | None = None) -> None:
        self.files = files
        self.name = name
        self.revision = revision
        self.config = self.json("config.json")
        self._places: dict[str, tuple[str, Place]] = {}
        self._open_shards()
        self.tensors = {n: place.spec for n, (_, place) in self._places.items()}
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def json(self, name: str) -> dict[str, object]:
        """A small JSON file of the checkpoint. Raises SourceError when it is missing or not a JSON object."""
        if self.files.files.get(name, 0) > JSON_LIMIT:
            raise SourceError(
                f"{name} is {self.files.files[name]} bytes, too large for what it should be. Fetch the "
                "checkpoint again."
            )
        try:
            value = json.loads(self.files.fetch(name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise SourceError(
                f"{name} of {self.name} is not readable JSON ({error}). Fetch or copy it again."
            ) from error
        if not isinstance(value, dict):
            raise SourceError(f"{name} of {self.name} is not a JSON object. Fetch or copy it again.")
        return value

    def shard_of(self, name: str) -> str:
        """The file a tensor lies in."""
        return self._places[name][0]

    def fingerprint(self) -> str:
        """sha256 over every tensor's name, dtype, shape and place, and each shard's stamp (of a few samples, or its
        commit): changes when the checkpoint is another one."""
        digest = hashlib.sha256()
        for shard in sorted({shard for shard, _ in self._places.values()}):
            digest.update(f"{shard} {self.files.files[shard]} {self.files.stamp(shard)}\n".encode())
        for name, (shard, place) in sorted(self._places.items()):
            digest.update(f"{name} {place.spec.dtype} {place.spec.shape} {shard} {place.begin}\n".encode())
        return digest.hexdigest()

    def read(self, piece: Piece) -> np.ndarray:
        """The bytes of a part of a tensor, uint8, in row order (before any transposition and row step)."""
        shard, begin, size, _ = self._range(piece)
        buffer = np.empty(size, dtype=np.uint8)
        self._fill(shard, begin, buffer)
        return buffer

    def read_rows(self, piece: Piece, start: int, into: np.ndarray) -> None:
        """Fill a uint8 buffer with a slab of a piece that is not transposed: whole rows, from its row `start` on."""
        shard, begin, _, row_bytes = self._range(piece)
        self._fill(shard, begin + start * row_bytes, into)

    def _range(self, piece: Piece) -> tuple[str, int, int, int]:
        """(shard, first byte, bytes, bytes of a row) of what must be read for a piece."""
        shard, place = self._places[piece.tensor]
        shape = place.spec.shape
        begin, size = place.begin, place.spec.nbytes
        for at in piece.index:
            size //= shape[0]
            begin, shape = begin + at * size, shape[1:]
        row_bytes = size // shape[0] if shape and shape[0] else 0
        if not piece.transposed and shape and piece.step == 1:
            rows = range(*slice(piece.start, piece.stop).indices(shape[0]))
            begin, size = begin + rows.start * row_bytes, len(rows) * row_bytes
        return shard, begin, size, row_bytes

    def small_folder(self) -> Path:
        """The folder with everything but the weights: tokenizer files, and code that a checkpoint may bring."""
        if isinstance(self.files, LocalFiles):
            return self.files.folder
        names = ["config.json", *small_files(self)]
        paths = [self.files.fetch(name) for name in names if name in self.files.files]
        return paths[0].parent

    def all_files(self) -> Mapping[str, int]:
        """Every file of the checkpoint, name -> bytes."""
        return self.files.files

    def place(self, name: str) -> tuple[int, int]:
        """(open file descriptor, first byte) of a whole tensor, for copying it file to file."""
        shard, place = self._places[name]
        return self._descriptor(shard), place.begin

    def mapped(self, name: str) -> np.ndarray:
        """The bytes of a whole tensor as memory that is read from its file when it is used."""
        descriptor, begin = self.place(name)
        before = begin % mmap.ALLOCATIONGRANULARITY
        size = self.tensors[name].nbytes
        memory = mmap.mmap(descriptor, before + size, access=mmap.ACCESS_COPY, offset=begin - before)
        return np.frombuffer(memory, np.uint8, size, before)

    def drop(self, shards: Iterable[str]) -> None:
        """These shards are not needed again."""
        for shard in shards:
            with self._lock:
                descriptor = self._descriptors.pop(shard, None)
            if descriptor is not None:
                os.close(descriptor)
            self.files.drop(shard)

    def close(self) -> None:
        with self._lock:
            descriptors, self._descriptors = list(self._descriptors.values()), {}
        for descriptor in descriptors:
            os.close(descriptor)
        self.files.close()

    def _descriptor(self, shard: str) -> int:
        with self._lock:
            if shard in self._descriptors:
                return self._descriptors[shard]
        path = self.files.fetch(shard)  # may take minutes; not under the lock
        with self._lock:
            if shard not in self._descriptors:
                self._descriptors[shard] = os.open(path, os.O_RDONLY)
            return self._descriptors[shard]

    def _fill(self, shard: str, begin: int, buffer: np.ndarray) -> None:
        descriptor, view, done = self._descriptor(shard), memoryview(buffer.data), 0
        while done < len(view):
            read = os.preadv(descriptor, [view[done:]], begin + done)
            if read == 0:
                raise SourceError(f"{shard} ended early: it changed while it was read. Fetch or copy it again.")
            done += read

    def _open_shards(self) -> None:
        weight_map = self._weight_map()
        wanted = sorted(set(weight_map.values())) if weight_map else self._loose_shards()
        missing = [s for s in wanted if s not in self.files.files]
        if missing:
            raise SourceError(
                f"{self.name} lacks {len(missing)} of {len(wanted)} shards: {', '.join(missing[:5])}. Fetch the "
                f"checkpoint again."
            )
        for shard in wanted:
            for name, place in parse_header(self.files.header(shard), self.files.files[shard], shard).items():
                if name in self._places and name not in weight_map:
                    raise SourceError(
                        f"Tensor {name!r} lies in both {self._places[name][0]} and {shard}. Add an index that says "
                        f"which counts."
                    )
                if not weight_map or weight_map.get(name, shard) == shard:
                    self._places[name] = (shard, place)
        lost = [n for n in weight_map if n not in self._places]
        if lost:
            raise SourceError(
                f"{INDEX} lists {lost[0]!r} in {weight_map[lost[0]]}, which does not hold it ({len(lost)} such). "
                f"Fetch the checkpoint again."
            )

    def _weight_map(self) -> dict[str, str]:
        if INDEX not in self.files.files:
            return {}
        weight_map = self.json(INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise SourceError(f"{INDEX} has no weight_map of names to files. Fetch it again.")
        for shard in set(weight_map.values()):
            check_inside(shard)
            if not shard.endswith(".safetensors"):
                raise SourceError(f"{INDEX} names {shard!r}, which is no safetensors file. Only safetensors are read.")
        return weight_map

    def _loose_shards(self) -> list[str]:
        shards = [n for n in self.files.files if n.endswith(".safetensors") and "/" not in n]
        if "model.safetensors" in shards:
            return ["model.safetensors"]
        if not shards:
            pickles = [n for n in self.files.files if n.endswith(_PICKLES)]
            if pickles:
                raise SourceError(
                    f"{self.name} holds {pickles[0]} and no safetensors. Pickled weights can run code and are "
                    f"never read; "
                    "save the model with save_pretrained(safe_serialization=True) first."
                )
            raise SourceError(
                f"{self.name} holds no .safetensors file. Pass a model folder with weights in safetensors form."
            )
        return shards


def open_source(model: str | Path, revision: str | None = None, work: Path | None = None) -> Source:
    """Open a local folder or a Hub id ("org/name").

    work   where Hub shards are kept while they are needed; a temporary folder when None
    Raises SourceError when it is neither, or when it is broken.
    """
    try:
        folder = Path(model).expanduser()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long, a home that nobody has
        raise SourceError(f"{model} does not exist: {error}. Pass a model folder, or a Hub id.") from error
    if is_folder and not os.access(folder, os.R_OK | os.X_OK):
        raise SourceError(f"{folder} may not be read: permission denied. Check the folder's rights.")
    if is_folder:
        if (folder / "journal.jsonl").exists() and not (folder / "config.json").exists():
            raise SourceError(
                f"{folder} is an unfinished output of roundel. Repeat the command that began it to finish it."
            )
        if not (folder / "config.json").exists():
            below = sorted(path.parent.name for path in folder.glob("*/config.json"))
            other = (
                f"one in it that has: {', '.join(below)}"
                if below
                else "the one that holds config.json and *.safetensors"
            )
            raise SourceError(f"{folder} is not a model folder: it has no config.json. Pass {other}.")
        return Source(LocalFiles(folder), folder.resolve().name)
    text = str(model)
    if folder.exists():
        raise SourceError(f"{text} is a file. Pass the folder that holds config.json and *.safetensors.")
    looks_local = text.startswith((".", "/", "~")) or text.count("/") != 1 or text.endswith("/")
    if looks_local:
        raise SourceError(f"{text} does not exist. Pass a model folder, or a Hub id of the form org/name.")
    import tempfile

    from roundel.io.hub import HubSnapshot

    home = work if work is not None else Path(tempfile.mkdtemp(prefix="roundel-"))
    snapshot = HubSnapshot(text, revision, home)
    return Source(snapshot, text, snapshot.commit)


def small_files(source: Source) -> Mapping[str, int]:
    """The files that travel along unchanged: everything but weights, indices and old model cards, name -> bytes."""
    left = {
        "config.json",
        "quantization_config.json",
        "quantize_config.json",
        "quant_config.json",
        "hf_quant_config.json",
        "README.md",
        "recipe.json",
        "report.json",
        "report.html",
        "journal.jsonl",
        "log.jsonl",
    }
    return {n: b for n, b in source.all_files().items() if not is_weight_file(n) and n not in left}
