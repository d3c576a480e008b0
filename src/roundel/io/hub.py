"""A model on the Hub as files on disk: small ones at once, shards when first needed, gone after their last use.

A file grows under `.hub/partial`, is compared with the size and sha256 the Hub lists, and only then takes its name:
a killed process leaves a file whole or resumable, and two runs never see half of one. Knows no tensors: a header is
the raw bytes in front of them. Executes and unpickles nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from roundel.errors import SourceError
from roundel.io.hub_repository import HubFile, HubRepository, offline

__all__ = ["HubSnapshot"]

_SMALL_BYTES = 64 << 20
_SMALL_SUFFIXES = frozenset(
    ("", ".bpe", ".jinja", ".json", ".md", ".model", ".py", ".spm", ".tiktoken", ".txt", ".vocab", ".yaml", ".yml")
)
_HEADER_BYTES = 100_000_000  # the bound the safetensors format sets itself


@dataclass(frozen=True)
class _Background:
    """The one download that runs ahead. `halt` asks it to stop, `done` says that it has ended, well or not."""

    name: str
    halt: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)


class HubSnapshot:
    """The files of one Hub revision: small ones at hand, shards fetched at first use and dropped after the last.

    Law: every byte comes from `commit`, the one that `revision` (None: the main branch) named when `folder` was first
    opened. Opened again, the folder keeps that commit, asks for nothing it has and takes up unfinished files where
    they broke. A file in the user's own Hugging Face cache is used from there and never deleted; with HF_HUB_OFFLINE
    that cache is the only source. One process at a time may use a folder; its methods may be called from any thread.

    repo_id   `org/name`
    commit    the sha everything is read from
    files     name -> bytes, of every file in the repository (offline: in the cache)

    `on_bytes(name, count)` is called as bytes arrive, in the thread that reads them. Raises SourceError, here and in
    every method, when the Hub refuses, is out of reach or lists what cannot be used, and when the disk is full.
    """

    repo_id: str
    commit: str
    files: dict[str, int]

    def __init__(
        self, repo_id: str, revision: str | None, folder: Path, on_bytes: Callable[[str, int], None] | None = None
    ) -> None:
        self.repo_id = repo_id
        self._repository = HubRepository(repo_id, revision)
        self._folder = folder
        self._on_bytes = on_bytes
        self._closed = threading.Event()
        self._background: _Background | None = None
        self._guard = threading.Lock()
        self.commit, self._listed = self._remembered() or self._list()
        self.files = {name: file.size for name, file in self._listed.items()}
        self._locks = {name: threading.Lock() for name in self.files}
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(self._place, [name for name, size in self.files.items() if _is_small(name, size)]):
                pass

    def header(self, name: str) -> bytes:
        """The first 8 + N bytes of a safetensors file: its little-endian length N, then N bytes of JSON.

        Two range requests and not a byte of weights; kept in the folder. Raises SourceError when N does not fit.
        """
        size = self._size(name)
        kept = self._folder / ".hub" / "header" / name
        with self._repository.explained(name):
            if kept.is_file():
                return kept.read_bytes()
            prefix = self._read(name, 0, min(8, size))
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > _HEADER_BYTES or 8 + length > size:
                raise SourceError(
                    f"{self.repo_id}: {name} is not a safetensors file. It has {size} bytes and states a header of "
                    f"{length}. Ask its author for a whole file, or pass another revision."
                )
            header = prefix + self._read(name, 8, 8 + length)
            _write(kept, header)
        return header

    def stamp(self, name: str) -> str:
        """The commit the file is of."""
        return self.commit

    def fetch(self, name: str) -> Path:
        """The file, whole, on disk: in the folder, in the user's own cache, or else downloaded now.

        Waits for a download of it that is under way. Where that one failed, this one tries again and raises.
        """
        background = self._background
        if background is not None and background.name == name:
            background.done.wait()
        return self._settle(name, self._closed)

    def prefetch(self, name: str) -> None:
        """Begin to download a file in the background; does nothing while another background download runs."""
        self._size(name)
        with self._guard:
            if self._closed.is_set() or (self._background is not None and not self._background.done.is_set()):
                return
            self._background = _Background(name)
            threading.Thread(target=self._run_ahead, args=(self._background,), daemon=True).start()

    def drop(self, name: str) -> None:
        """Delete the downloaded file, whole or not. A copy in the user's own cache stays."""
        self._size(name)
        background = self._background
        if background is not None and background.name == name:
            background.halt.set()
            background.done.wait()
        with self._locks[name], self._repository.explained(name):
            (self._folder / name).unlink(missing_ok=True)
            self._partial(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Stop all downloads. What they brought stays, to be taken up when the folder is opened again."""
        with self._guard:
            self._closed.set()
        if self._background is not None:
            self._background.halt.set()
            self._background.done.wait(timeout=2.0)  # a silent server may hold the daemon thread for longer

    def _remembered(self) -> tuple[str, dict[str, HubFile]] | None:
        """Commit and files as the folder remembers them, or None for a new folder."""
        record = self._folder / ".hub" / "snapshot.json"
        if not record.is_file():
            return None
        with self._repository.explained(str(record)):
            kept = json.loads(record.read_bytes())
        asked = self._repository.revision
        if kept["repo_id"] != self.repo_id or asked not in (kept["revision"], kept["commit"]):
            raise SourceError(
                f"{self._folder} holds files of {kept['repo_id']} at {kept['revision']} ({kept['commit']}). "
                f"Files of {self.repo_id} at {asked} would mix with them. Pass another folder, or delete this one."
            )
        return kept["commit"], {name: HubFile(**file) for name, file in kept["files"].items()}

    def _list(self) -> tuple[str, dict[str, HubFile]]:
        commit, files = self._repository.list()
        if not offline():  # what the cache holds is perhaps not all there is
            listed = {name: asdict(file) for name, file in files.items()}
            asked = {"repo_id": self.repo_id, "revision": self._repository.revision}
            with self._repository.explained():
                _write(
                    self._folder / ".hub" / "snapshot.json",
                    json.dumps({**asked, "commit": commit, "files": listed}).encode(),
                )
        return commit, files

    def _size(self, name: str) -> int:
        if name not in self.files:
            where = "is not in the local cache, and HF_HUB_OFFLINE is set" if offline() else "is not listed"
            raise SourceError(
                f"{self.repo_id} has no file {name}. At commit {self.commit} it {where}. "
                "Pass another revision, or a local folder that holds it."
            )
        return self.files[name]

    def _partial(self, name: str) -> Path:
        return self._folder / ".hub" / "partial" / name

    def _whole(self, name: str) -> Path | None:
        """The file if it is on disk already, in the folder or in the user's own cache."""
        for path in (self._folder / name, self._repository.cached(self.commit, name)):
            if path is not None and path.is_file() and path.stat().st_size == self.files[name]:
                return path
        return None

    def _place(self, name: str) -> None:
        """Have a small file in the folder itself, wherever it comes from."""
        found = self.fetch(name)
        if found != self._folder / name:
            with self._repository.explained(name):
                _write(self._folder / name, found.read_bytes())

    def _settle(self, name: str, halt: threading.Event) -> Path:
        self._size(name)
        with self._locks[name], self._repository.explained(name):
            return self._whole(name) or self._download(name, halt)

    def _run_ahead(self, background: _Background) -> None:
        try:
            self._settle(background.name, background.halt)
        except SourceError:
            pass  # fetch tries again, and raises where someone listens
        finally:
            background.done.set()

    def _download(self, name: str, halt: threading.Event) -> Path:
        """Bring what is missing of a file, compare it with the listing, give it its name."""
        listed, target, partial = self._listed[name], self._folder / name, self._partial(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with partial.open("a+b") as file:  # "a": every write goes to the end
            file.seek(0)
            while chunk := file.read(1 << 20):
                digest.update(chunk)
            present = file.tell()
            if shutil.disk_usage(partial.parent).free < listed.size - present:
                raise OSError(errno.ENOSPC, f"{listed.size - present} bytes are still to come")
            for piece in self._repository.read(self.commit, name, present, listed.size, halt):
                file.write(piece)
                digest.update(piece)
                present += len(piece)
                if self._on_bytes is not None:
                    self._on_bytes(name, len(piece))
            file.flush()
            os.fsync(file.fileno())
        if present != listed.size or listed.sha256 not in (None, digest.hexdigest()):
            partial.unlink()
            raise SourceError(
                f"{self.repo_id}: {name} arrived damaged. It has {present} bytes and sha256 {digest.hexdigest()}, the "
                f"Hub lists {listed.size} and {listed.sha256}. It is deleted; run again to download it anew."
            )
        os.replace(partial, target)
        return target

    def _read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a file, from the disk if it is there."""
        whole = self._whole(name)
        if whole is None:
            return b"".join(self._repository.read(self.commit, name, start, stop, self._closed))
        with whole.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)


def _is_small(name: str, size: int) -> bool:
    """Whether a file comes with the snapshot: configuration, tokenizer, templates, index, code, licence."""
    path = PurePosixPath(name)
    near = path.parent.as_posix() in (".", "additional_chat_templates")
    return near and size <= _SMALL_BYTES and path.suffix in _SMALL_SUFFIXES and not name.startswith(".")


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)
