"""Importance-matrix files of llama.cpp: for every matrix of a model, the sums of squares of what entered each column.

Two layouts, both read and written (llama.cpp, tools/imatrix/imatrix.cpp). GGUF: values `general.type` "imatrix",
`imatrix.datasets`, `imatrix.chunk_count` and `imatrix.chunk_size`; of each matrix the float32 tensors NAME.in_sum2
[matrices, in] and NAME.counts [matrices, 1], tokens, where a stack of experts is `matrices` of them; tensors of other
endings are not looked at. Legacy (.dat): an int32 count of entries, then of each the length of its name, the name, a
count of calls, a count of values, and these as float32: all experts' one after the other, each a mean times the calls;
at the end may stand the chunks, and the length and the name of the text. All is little-endian.

Nothing is believed before it was checked against the file's size; values are read when they are asked for.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from roundel.errors import SourceError
from roundel.io.gguf import MAGIC, GgufTensor, GgufValue, lay_out_gguf, read_gguf
from roundel.io.safetensors import ShardLayout

__all__ = ["Imatrix", "ImatrixEntry", "Summed", "lay_out_imatrix", "legacy_imatrix", "read_imatrix"]

SUMS, COUNTS = ".in_sum2", ".counts"
_NUMBER = struct.Struct("<i")
_SMALLEST_ENTRY = 3 * _NUMBER.size  # bytes that a legacy entry takes at least


@dataclass(frozen=True)
class ImatrixEntry:
    """The sums of one matrix, or of a stack of experts.

    begin    where its float32 values lie in the file
    size     how many they are
    counts   by what sums are to be divided, one for each expert or one for all
    """

    begin: int
    size: int
    counts: tuple[float, ...]


@dataclass(frozen=True)
class Summed:
    """What entered a matrix: the mean square of each column [in] float32, and of how many tokens it is (None: the file
    does not say). Without a token, all columns count 1, as llama.cpp takes it."""

    mean_square: np.ndarray
    tokens: int | None


@dataclass(frozen=True)
class Imatrix:
    """A file that was checked.

    entries   by llama.cpp's names of tensors: "blk.0.ffn_down.weight"
    legacy    counts are calls, of a number of tokens that nobody knows
    sha256    of the file
    """

    path: Path
    entries: Mapping[str, ImatrixEntry]
    legacy: bool
    sha256: str

    def misfit(self, name: str, width: int, matrices: int = 1) -> str | None:
        """Why an entry is not that of `matrices` matrices of `width` columns, or None."""
        entry = self.entries[name]
        if entry.size == width * matrices and matrices % len(entry.counts) == 0:
            return None
        stack = f"{matrices} experts of " if matrices > 1 else ""
        return f"{self.path.name} has {entry.size} importances for {name}, which has {stack}{width} columns"

    def of(self, name: str, width: int, matrix: int = 0, matrices: int = 1) -> Summed:
        """What entered one matrix. Raises SourceError where it does not fit, or where a value is no mean square."""
        problem = self.misfit(name, width, matrices)
        if problem is not None:
            raise SourceError(f"{problem}. Take a file that was made of this model.")
        entry = self.entries[name]
        count = entry.counts[matrix * len(entry.counts) // matrices]
        values = _floats(self.path, entry.begin + 4 * width * matrix, width)
        if not bool(np.isfinite(values).all()) or bool((values < 0).any()):
            raise SourceError(f"{self.path.name}: {name} has sums of squares that are negative or no numbers.")
        if self.legacy:
            return Summed(values / np.float32(count) if count > 0 else values, None)
        if count <= 0:
            return Summed(np.ones_like(values), 0)
        return Summed(values / np.float32(count), int(count))


def read_imatrix(path: Path) -> Imatrix:
    """A file of either layout. Raises SourceError for anything else."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(0)

    except OSError as error:
        raise SourceError(
            f"{path} cannot be read: {error.strerror}. Name a file of llama.cpp's llama-imatrix."
        ) from error
    entries = _gguf_entries(path) if start == MAGIC else _legacy_entries(path, size)
    return Imatrix(path, entries, start != MAGIC, _hash(path))


def lay_out_imatrix(
    name: str, stacks: Mapping[str, tuple[int, int]], datasets: Sequence[str], chunks: int, chunk_size: int
) -> ShardLayout:
    """A GGUF file before it exists, to be written by `io.safetensors.Shard`.

    stacks   name of a tensor -> (matrices, columns)
    chunks, chunk_size   samples, and tokens of one
    """
    values = {
        "general.type": GgufValue("str", "imatrix"),
        "imatrix.datasets": GgufValue("str", tuple(datasets)),
        "imatrix.chunk_count": GgufValue("u32", chunks),
        "imatrix.chunk_size": GgufValue("u32", chunk_size),
    }
    tensors = [
        tensor
        for each, (matrices, width) in sorted(stacks.items())
        for tensor in (
            GgufTensor(each + SUMS, "F32", (matrices, width)),
            GgufTensor(each + COUNTS, "F32", (matrices, 1)),
        )
    ]
    return lay_out_gguf(name, values, tensors)


def legacy_imatrix(found: Imatrix, chunks: int, chunk_size: int, dataset: str) -> bytes:
    """The legacy file that says what a GGUF file says."""
    told = {name: entry for name, entry in sorted(found.entries.items()) if any(entry.counts)}
    parts = [_NUMBER.pack(len(told))]
    for name, entry in told.items():
        calls = math.ceil(max(entry.counts) / chunk_size)
        sums = _floats(found.path, entry.begin, entry.size).reshape(len(entry.counts), -1)
        counts = np.array(entry.counts, np.float32)[:, None]
        means = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1)) * np.float32(calls)
        raw = name.encode()
        parts += [_NUMBER.pack(len(raw)), raw, _NUMBER.pack(calls), _NUMBER.pack(entry.size)]
        parts.append(means.astype("<f4").tobytes())
    raw = dataset.encode()
    return b"".join((*parts, _NUMBER.pack(chunks), _NUMBER.pack(len(raw)), raw))


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _floats(path: Path, begin: int, count: int) -> np.ndarray:
    with path.open("rb") as file:
        data = os.pread(file.fileno(), 4 * count, begin)
    if len(data) < 4 * count:
        raise SourceError(f"{path.name} became shorter while it was read. Fetch or copy the file again.")
    return np.frombuffer(data, "<f4")


def _gguf_entries(path: Path) -> dict[str, ImatrixEntry]:
    header = read_gguf(path)
    found: dict[str, ImatrixEntry] = {}
    for name in (n.removesuffix(SUMS) for n in header.tensors if n.endswith(SUMS)):
        sums, counts = header.tensors[name + SUMS], header.tensors.get(name + COUNTS)
        if counts is None or {sums.type, counts.type} != {"F32"}:
            raise SourceError(f"{path.name}: {name} has no {COUNTS[1:]}, or they are not float32: it is damaged.")
        size, number = math.prod(sums.shape), math.prod(counts.shape)
        if not 0 < number <= size or size % number:
            raise SourceError(f"{path.name}: {name} has {size} sums and {number} counts: it is damaged.")
        told = _floats(path, header.places[name + COUNTS].begin, number)
        if not bool(np.isfinite(told).all()) or bool((told < 0).any()):
            raise SourceError(f"{path.name}: {name} has counts that are negative or no numbers: it is damaged.")
        found[name] = ImatrixEntry(header.places[name + SUMS].begin, size, tuple(told.tolist()))
    if not found:
        raise SourceError(f"{path.name} is a GGUF file without importances. Name a file of llama.cpp's llama-imatrix.")
    return found


def _legacy_entries(path: Path, size: int) -> dict[str, ImatrixEntry]:
    with path.open("rb") as file:
        at = 0

        def broken(why: str) -> SourceError:
            return SourceError(
                f"{path.name} is no file of importances: {why}. Name a file of llama.cpp's llama-imatrix."
            )

        def number(what: str, least: int) -> int:
            nonlocal at
            raw = os.pread(file.fileno(), _NUMBER.size, at)
            if len(raw) < _NUMBER.size:
                raise broken(f"it ends before {what}")
            at += _NUMBER.size
            (value,) = _NUMBER.unpack(raw)
            if value < least:
                raise broken(f"{what} is {value}")
            return int(value)

        def text(what: str, least: int) -> bytes:
            nonlocal at
            length = number(f"the length of {what}", least)
            if length > size - at:
                raise broken(f"{what} is {length} bytes long, and {size - at} are left")
            at += length
            return os.pread(file.fileno(), length, at - length)

        count = number("its count of entries", 1)
        if count * _SMALLEST_ENTRY > size:
            raise broken(f"it claims {count} entries, more than {size} bytes can hold")
        found: dict[str, ImatrixEntry] = {}
        for _ in range(count):
            raw = text("a name", 1)
            try:
                name = raw.decode()
            except UnicodeDecodeError as error:
                raise broken("a name is not UTF-8") from error
            calls, values = number(f"the calls of {name!r}", 0), number(f"the count of values of {name!r}", 1)
            if 4 * values > size - at:
                raise broken(f"{name!r} claims {values} values, and {size - at} bytes are left")
            if name in found:
                raise broken(f"it has {name!r} twice")
            found[name] = ImatrixEntry(at, values, (float(calls),))
            at += 4 * values
        if at < size:
            number("its count of chunks", 0)
        if at < size:
            text("the name of its text", 0)
        if at < size:
            raise broken(f"{size - at} bytes follow its end")
    return found
