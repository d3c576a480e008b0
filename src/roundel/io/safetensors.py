"""Safetensors files as bytes and names: a strict header reader, and a writer whose header comes first.

A file is 8 bytes (little-endian length N), N bytes of JSON {name: {dtype, shape, data_offsets}}, then the tensors,
back to back (safetensors README, "Format"). Reading trusts nothing: every claim of a header is checked against the
file's size before a byte of data is touched. Writing lays all tensors out beforehand; each is then put at its offset,
in any order, from any thread. Within a shard, tensors stand by falling item size, so that each is aligned to its dtype.
"""

from __future__ import annotations

import json
import os
import reprlib
import struct
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from roundel.errors import OutputError, SourceError
from roundel.tensor import ITEMSIZE, TensorSpec

__all__ = [
    "HEADER_LIMIT",
    "Place",
    "Shard",
    "ShardLayout",
    "Stacks",
    "lay_out",
    "parse_header",
    "raw_header",
    "stacked",
]

HEADER_LIMIT = 100_000_000  # bytes; the reference reader's own limit
_AXES_LIMIT = 64  # what torch and numpy can hold
_KNOWN_NAMES = "BF16, F16, F32, F64, F8_E4M3, F8_E5M2, F8_E8M0, BOOL and the integers of 8 to 64 bits"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its spec, and the absolute byte range in its file."""

    spec: TensorSpec
    begin: int
    end: int


def raw_header(path: Path) -> bytes:
    """The first 8 + N bytes of a file. Raises SourceError when the file is shorter than it says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = header_length(head, size, path.name)
        return head + file.read(length)


def header_length(head: bytes, file_size: int, file_name: str) -> int:
    """N of the first 8 bytes, checked against the file's size and the format's limit."""
    if len(head) < 8:
        raise _broken(
            file_name, f"it is {len(head)} bytes long, shorter than the 8 bytes that start a safetensors file"
        )
    (length,) = struct.unpack("<Q", head)
    if length > HEADER_LIMIT:
        raise _broken(file_name, f"its header claims {length} bytes, more than the format's limit of {HEADER_LIMIT}")
    if 8 + length > file_size:
        raise _broken(file_name, f"its header claims {length} bytes and the file has {file_size}")
    return int(length)


def parse_header(raw: bytes, file_size: int, file_name: str) -> dict[str, Place]:
    """Every tensor of a file by name.

    raw is the 8 + N bytes of the header. Raises SourceError for anything that is not exactly a safetensors header:
    not UTF-8, not JSON, twice the same name, an unknown dtype, offsets that overlap, leave holes or leave the file.
    """
    length = header_length(raw[:8], file_size, file_name)
    try:
        header = json.loads(raw[8 : 8 + length].decode("utf-8"), object_pairs_hook=_no_duplicates)
        "".join(header if isinstance(header, dict) else ()).encode()  # an escaped lone surrogate is no text either
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise _broken(file_name, f"its header is not UTF-8 ({error.reason})") from error
    except _Duplicate as error:
        raise _broken(file_name, f"its header names {error} twice") from error
    except (ValueError, RecursionError) as error:  # a plain ValueError for a number of 5000 digits
        raise _broken(file_name, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _broken(file_name, "its header is not a JSON object")
    header.pop("__metadata__", None)
    places = {name: _place(name, entry, 8 + length, file_name) for name, entry in header.items()}
    cursor = 8 + length
    for place in sorted(places.values(), key=lambda p: (p.begin, p.end)):
        if place.begin != cursor:
            what = "overlap" if place.begin < cursor else "leave a hole"
            raise _broken(file_name, f"its tensors {what} before {place.spec.name!r}")
        cursor = place.end
    if cursor > file_size:
        raise _broken(file_name, f"it should be {cursor} bytes long and has {file_size}: it is truncated")
    if cursor < file_size:
        raise _broken(file_name, f"{file_size - cursor} bytes follow its last tensor")
    return places


def _place(name: str, entry: object, data_begin: int, file_name: str) -> Place:
    if not isinstance(entry, dict):
        raise _broken(file_name, f"tensor {name!r} is described by {type(entry).__name__}, not by an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise _broken(file_name, f"tensor {name!r} has dtype {reprlib.repr(dtype)}; known are {_KNOWN_NAMES}")
    if not isinstance(shape, list) or not _whole_numbers(shape) or len(shape) > _AXES_LIMIT:
        raise _broken(file_name, f"tensor {name!r} has shape {reprlib.repr(shape)}")
    if not isinstance(offsets, list) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise _broken(file_name, f"tensor {name!r} has data_offsets {reprlib.repr(offsets)}")
    spec = TensorSpec(name, dtype, tuple(shape))
    if offsets[1] - offsets[0] != spec.nbytes:
        raise _broken(
            file_name,
            f"tensor {name!r} {dtype} {shape} takes {spec.nbytes} bytes and is given {offsets[1] - offsets[0]}",
        )
    return Place(spec, data_begin + offsets[0], data_begin + offsets[1])


def _whole_numbers(value: list[object]) -> bool:
    return all(type(v) is int and 0 <= v < 2**62 for v in value)


class _Duplicate(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise _Duplicate(repr(key))
        found[key] = value
    return found


def _broken(file_name: str, why: str) -> SourceError:
    return SourceError(f"{file_name} cannot be read: {why}. Fetch or copy the file again.")


@dataclass(frozen=True)
class ShardLayout:
    """One output file before it exists: its name, its header's bytes, the place of every tensor.

    tail      how many zeros follow the last tensor
    members   the places of tensors that are written by themselves and lie, in the file, as parts of a stacked one
    """

    name: str
    header: bytes
    places: Mapping[str, Place]
    tail: int = 0
    members: Mapping[str, Place] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return max((p.end for p in self.places.values()), default=len(self.header)) + self.tail


Stacks = Mapping[str, tuple[str, int]]  # a tensor's name -> the stacked tensor it is a part of, and its index there


def stacked(specs: Sequence[TensorSpec], stacks: Stacks) -> list[TensorSpec]:
    """The tensors that a file holds: members of a stack give way, at the first one's turn, to one [members, ...].

    The members of a stack are all there, and alike.
    """
    members: dict[str, list[TensorSpec]] = {}
    found: list[TensorSpec | str] = []
    for spec in specs:
        if spec.name not in stacks:
            found.append(spec)
            continue
        name = stacks[spec.name][0]
        if name not in members:
            found.append(name)
        members.setdefault(name, []).append(spec)
    return [_stack(f, members[f]) if isinstance(f, str) else f for f in found]


def _stack(name: str, members: Sequence[TensorSpec]) -> TensorSpec:
    first = members[0]
    assert all((m.dtype, m.shape) == (first.dtype, first.shape) for m in members), f"{name}: its members are not alike"
    return TensorSpec(name, first.dtype, (len(members), *first.shape))


def lay_out(
    specs: Sequence[TensorSpec], shard_bytes: int, stem: str = "model", stacks: Stacks | None = None
) -> tuple[ShardLayout, ...]:
    """Tensors into files of at most `shard_bytes` (a larger tensor gets a file of its own), in the order given."""
    layouts = _lay_out(stacked(specs, stacks or {}), shard_bytes, stem)
    if not stacks:
        return layouts
    return tuple(replace(layout, members=_members(layout, specs, stacks)) for layout in layouts)


def _members(layout: ShardLayout, specs: Iterable[TensorSpec], stacks: Stacks) -> dict[str, Place]:
    found = {}
    for spec in specs:
        name, index = stacks.get(spec.name, ("", 0))
        if name in layout.places:
            begin = layout.places[name].begin + index * spec.nbytes
            found[spec.name] = Place(spec, begin, begin + spec.nbytes)
    return found


def _lay_out(specs: Sequence[TensorSpec], shard_bytes: int, stem: str) -> tuple[ShardLayout, ...]:
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    if len(groups) == 1:
        return (_lay_out_file(f"{stem}.safetensors", groups[0]),)
    total = len(groups)
    return tuple(_lay_out_file(f"{stem}-{i:05d}-of-{total:05d}.safetensors", g) for i, g in enumerate(groups, 1))


def _lay_out_file(name: str, specs: Iterable[TensorSpec]) -> ShardLayout:
    ordered = sorted(specs, key=lambda s: -ITEMSIZE[s.dtype])  # stable: plan order within one item size
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: list[tuple[TensorSpec, int]] = []
    cursor = 0
    for spec in ordered:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [cursor, cursor + spec.nbytes],
        }
        offsets.append((spec, cursor))
        cursor += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    places = {s.name: Place(s, begin + o, begin + o + s.nbytes) for s, o in offsets}
    return ShardLayout(name, struct.pack("<Q", len(text)) + text, places)


class Shard:
    """A file being written under its layout: `NAME.partial` until `finish` gives it its name.

    Opening an existing partial file keeps its bytes, so that a killed run continues. `put` may be called from several
    threads at once. Raises OutputError when the file cannot be made or the disk is full.
    """

    def __init__(self, folder: Path, layout: ShardLayout) -> None:
        self.layout = layout
        self.path = folder / layout.name
        self.partial = folder / (layout.name + ".partial")
        self._turn = threading.Lock()  # the kernel lets one write a file at a time, and has the others spin
        try:
            self._file = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644)
            if os.fstat(self._file).st_size != layout.nbytes:
                os.ftruncate(self._file, 0)
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._file, 0, layout.nbytes)  # a full disk shows here, before any work
                else:
                    os.ftruncate(self._file, layout.nbytes)
            self._write(layout.header, 0)
        except OSError as error:
            raise OutputError(
                f"{self.partial} cannot be written: {error.strerror}. Free the disk or choose another folder."
            ) from error

    def put(self, name: str, data: memoryview | bytes, offset: int = 0) -> None:
        """Write bytes of one tensor, or of a member of a stacked one, `offset` bytes into it."""
        place = self.layout.places.get(name) or self.layout.members[name]
        assert place.begin + offset + len(data) <= place.end, f"{name}: bytes leave its place"
        self._write(data, place.begin + offset)

    def copy(self, name: str, source: int, begin: int) -> None:
        """Fill one tensor with the same number of bytes of another open file, without passing through our memory."""
        place = self.layout.places[name]
        done, total = 0, place.end - place.begin
        while done < total:
            step = self._copy_some(source, begin + done, place.begin + done, min(total - done, 16 << 20))
            self._start_writing(place.begin + done, step)
            done += step

    def _copy_some(self, source: int, begin: int, target: int, count: int) -> int:
        copied = 0
        if hasattr(os, "copy_file_range"):
            try:
                copied = os.copy_file_range(source, self._file, count, begin, target)
            except OSError:  # another file system, or a kernel without it: through a small buffer
                copied = 0
        if copied == 0:
            data = os.pread(source, min(count, 8 << 20), begin)
            if not data:
                raise SourceError(
                    f"A shard ended early while its tensor was copied to {self.path.name}. Fetch it again."
                )
            self._write(data, target)
            copied = len(data)
        return copied

    def _write(self, data: memoryview | bytes, offset: int) -> None:
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        while len(view):
            try:
                with self._turn:
                    written = os.pwrite(self._file, view, offset)
            except OSError as error:
                raise self._failed(error) from error
            view, offset = view[written:], offset + written

    def _start_writing(self, offset: int, count: int) -> None:
        """Have the disk begin on these bytes now, so that the flush at the end finds little left."""
        if hasattr(os, "posix_fadvise"):  # on dirty pages this advice starts write-back and drops nothing
            os.posix_fadvise(self._file, offset, count, os.POSIX_FADV_DONTNEED)

    def flush(self) -> None:
        """Make what was put so far survive a power cut, and give its memory back: nobody reads it here again."""
        try:
            getattr(os, "fdatasync", os.fsync)(self._file)
            if hasattr(os, "posix_fadvise"):  # else every write needs fresh pages, and pushes other files from memory
                os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:  # some file systems find out here that the disk is full
            raise self._failed(error) from error

    def close(self) -> None:
        os.close(self._file)

    def finish(self) -> None:
        """Flush, close, and take the final name."""
        try:
            os.fsync(self._file)
            self.close()
            self.partial.rename(self.path)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(
            f"Writing {self.partial} failed: {error.strerror}. What is finished is kept; free the disk and repeat the "
            "same command to continue."
        )
