"""GGUF files as bytes, names and typed values: a strict header reader, and a layout whose header comes first.

A file is "GGUF", a version, the counts of tensors and of values; the values (key, type, value); for each tensor its
name, dimensions, type and offset; then, from the next multiple of `general.alignment` (32), the tensors, each at such a
multiple (ggml's docs/gguf.md; llama.cpp, ggml/src/gguf.cpp). All numbers are little-endian. Dimensions stand in ggml's
order, the inner first; shapes here are [out, in], as everywhere else.

Reading trusts nothing: every count and size is checked against what is left of the file before it is used. Not read:
version 1, big-endian files, arrays of arrays. A model split over several files is several files here.

Writing is `io.safetensors.Shard` with a layout made by `lay_out_gguf`.
"""

from __future__ import annotations

import math
import os
import reprlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from roundel.errors import GridError, SourceError
from roundel.io.safetensors import Place, ShardLayout
from roundel.tensor import TensorSpec

__all__ = [
    "GGML_TYPES",
    "MAGIC",
    "GgmlType",
    "GgufHeader",
    "GgufTensor",
    "GgufValue",
    "lay_out_gguf",
    "read_gguf",
    "read_tensor",
]

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
AXES_LIMIT, NAME_LIMIT, KEY_LIMIT = 4, 63, 65535  # axes and bytes; llama.cpp's own limits
_SMALLEST_VALUE, _SMALLEST_TENSOR = 14, 25  # bytes of a header that one takes at least
_KINDS = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "arr", "u64", "i64", "f64")  # by number
_NUMPY = {
    "u8": "<u1", "i8": "<i1", "u16": "<u2", "i16": "<i2", "u32": "<u4", "i32": "<i4", "f32": "<f4", "u64": "<u8",
    "i64": "<i8", "f64": "<f8", "bool": "<u1",
}  # fmt: skip


@dataclass(frozen=True)
class GgmlType:
    """A type of ggml: its name, its number in files, weights in a block, bytes of a block."""

    name: str
    number: int
    weights: int
    nbytes: int


GGML_TYPES: dict[str, GgmlType] = {
    name: GgmlType(name, number, weights, nbytes)
    for name, number, weights, nbytes in (
        ("F32", 0, 1, 4), ("F16", 1, 1, 2), ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22),
        ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34), ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144),
        ("Q5_K", 13, 256, 176), ("Q6_K", 14, 256, 210), ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74),
        ("IQ3_XXS", 18, 256, 98), ("IQ1_S", 19, 256, 50), ("IQ4_NL", 20, 32, 18), ("IQ3_S", 21, 256, 110),
        ("IQ2_S", 22, 256, 82), ("IQ4_XS", 23, 256, 136), ("I8", 24, 1, 1), ("I16", 25, 1, 2), ("I32", 26, 1, 4),
        ("I64", 27, 1, 8), ("F64", 28, 1, 8), ("IQ1_M", 29, 256, 56), ("BF16", 30, 1, 2), ("TQ1_0", 34, 256, 54),
        ("TQ2_0", 35, 256, 66), ("MXFP4", 39, 32, 17), ("NVFP4", 40, 64, 36),
    )
}  # fmt: skip
_BY_NUMBER = {each.number: each for each in GGML_TYPES.values()}


@dataclass(frozen=True)
class GgufValue:
    """A typed value of the header.

    kind    "u32", "f32", "bool", "str" ...: of the value, or of each element
    value   a number, a bool or a text; of an array a tuple of texts, or a numpy array of numbers (bools as uint8)

    Texts hold bytes that are no UTF-8 as lone surrogates (surrogateescape), so that they are written as they were read.
    """

    kind: str
    value: int | float | bool | str | tuple[str, ...] | np.ndarray

    @property
    def is_array(self) -> bool:
        return isinstance(self.value, tuple | np.ndarray)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor before it exists: its name, its type's name in GGML_TYPES, its shape [out, in]."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def stored(self) -> TensorSpec:
        """As it lies in the file: floats and integers by their dtype, blocks as bytes [out, bytes of a row]."""
        kind = GGML_TYPES[self.type]
        if kind.weights == 1:
            return TensorSpec(self.name, self.type, self.shape)
        return TensorSpec(self.name, "U8", (*self.shape[:-1], self.shape[-1] // kind.weights * kind.nbytes))


@dataclass(frozen=True)
class GgufHeader:
    """What a file says of itself: its values by key, its tensors and their places (absolute, in bytes) by name."""

    metadata: Mapping[str, GgufValue]
    tensors: Mapping[str, GgufTensor]
    places: Mapping[str, Place]


class _Broken(Exception):
    """Why a header is refused."""


class _Cursor:
    """A file from which no more is asked than it has."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.left, self.at = file, size, 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise _Broken(f"{what} takes {count} bytes and {self.left} are left: it is damaged or truncated")
        data = self._file.read(count)
        if len(data) < count:
            raise _Broken("it became shorter while it was read")
        self.left -= count
        self.at += count
        return data

    def number(self, kind: str, what: str) -> int | float:
        (found,) = np.frombuffer(self.take(np.dtype(_NUMPY[kind]).itemsize, what), _NUMPY[kind]).tolist()
        assert isinstance(found, int | float)
        return found

    def whole(self, kind: str, what: str) -> int:
        return int(self.number(kind, what))

    def text(self, what: str, limit: int | None = None) -> bytes:
        length = self.whole("u64", what)
        if limit is not None and length > limit:
            raise _Broken(f"{what} is {length} bytes long, more than the format's limit of {limit}")
        return self.take(length, what)


def read_gguf(path: Path) -> GgufHeader:
    """The header of a file; tensors are not touched. Raises SourceError for anything that is not exactly GGUF."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _header(_Cursor(file, size), size)
    except _Broken as error:
        raise SourceError(f"{path.name} cannot be read: {error}. Fetch or copy the file again.") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}. Check the path and its rights.") from error


def read_tensor(path: Path, place: Place) -> np.ndarray:
    """The bytes of one tensor, uint8. Raises SourceError when the file has become shorter."""
    with path.open("rb") as file:
        data = os.pread(file.fileno(), place.end - place.begin, place.begin)
        while len(data) < place.end - place.begin:  # the kernel hands out 2 GB at most
            more = os.pread(file.fileno(), place.end - place.begin - len(data), place.begin + len(data))
            if not more:
                raise SourceError(f"{path.name} ended early inside {place.spec.name!r}. Fetch the file again.")
            data += more
    return np.frombuffer(data, np.uint8)


def _header(cursor: _Cursor, size: int) -> GgufHeader:
    if cursor.left < 24 or cursor.take(4, "its start") != MAGIC:
        raise _Broken("it does not begin as a GGUF file does")
    version = cursor.whole("u32", "its version")
    if version not in VERSIONS:
        why = "it is big-endian" if version & 0xFFFF == 0 else f"it is of version {version}"
        raise _Broken(f"{why}; versions {VERSIONS[0]} and {VERSIONS[1]} in little-endian are read")
    tensor_count = cursor.whole("u64", "its count of tensors")
    value_count = cursor.whole("u64", "its count of values")
    if tensor_count * _SMALLEST_TENSOR + value_count * _SMALLEST_VALUE > cursor.left:
        raise _Broken(f"it claims {tensor_count} tensors and {value_count} values, more than {size} bytes can hold")
    metadata: dict[str, GgufValue] = {}
    for _ in range(value_count):
        key = _name(cursor.text("a key", KEY_LIMIT))
        if not key or key in metadata:
            raise _Broken(f"it has the key {key!r} twice" if key else "a key is empty")
        metadata[key] = _value(cursor, key)
    alignment = _alignment(metadata)
    tensors: dict[str, tuple[GgufTensor, int]] = {}
    for _ in range(tensor_count):
        tensor, offset = _tensor(cursor)
        if tensor.name in tensors:
            raise _Broken(f"it has the tensor {tensor.name!r} twice")
        tensors[tensor.name] = tensor, offset
    begin = _padded(cursor.at, alignment)
    places = _places(tensors, begin, alignment, size)
    return GgufHeader(metadata, {name: tensor for name, (tensor, _) in tensors.items()}, places)


def _name(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _Broken(f"the name {reprlib.repr(raw)} is not UTF-8") from error


def _kind(cursor: _Cursor, key: str) -> str:
    number = cursor.whole("u32", f"the type of {key!r}")
    if number >= len(_KINDS):
        raise _Broken(f"the value of {key!r} has type {number}, which does not exist")
    return _KINDS[number]


def _value(cursor: _Cursor, key: str) -> GgufValue:
    kind, what = _kind(cursor, key), f"the value of {key!r}"
    if kind == "str":
        return GgufValue(kind, cursor.text(what).decode(errors="surrogateescape"))
    if kind != "arr":
        number = cursor.number("u8" if kind == "bool" else kind, what)
        if kind == "bool" and number > 1:
            raise _Broken(f"{what} is neither true nor false")
        return GgufValue(kind, bool(number) if kind == "bool" else number)
    kind = _kind(cursor, key)
    count = cursor.whole("u64", what)
    if kind == "arr":
        raise _Broken(f"{what} is an array of arrays, which are not read")
    width = 8 if kind == "str" else np.dtype(_NUMPY[kind]).itemsize
    if count * width > cursor.left:
        raise _Broken(f"{what} claims {count} elements and {cursor.left} bytes are left: it is damaged or truncated")
    if kind == "str":
        return GgufValue(kind, tuple(cursor.text(what).decode(errors="surrogateescape") for _ in range(count)))
    return GgufValue(kind, np.frombuffer(cursor.take(count * width, what), _NUMPY[kind]))


def _alignment(metadata: Mapping[str, GgufValue]) -> int:
    found = metadata.get(ALIGNMENT_KEY, GgufValue("u32", ALIGNMENT)).value
    if type(found) is not int or not 8 <= found <= 1 << 20 or found & (found - 1):
        raise _Broken(f"{ALIGNMENT_KEY} is {reprlib.repr(found)}, not a power of two from 8 on")
    return found


def _tensor(cursor: _Cursor) -> tuple[GgufTensor, int]:
    name = _name(cursor.text("the name of a tensor", KEY_LIMIT))
    axes = cursor.whole("u32", f"the axes of {name!r}")
    if axes > AXES_LIMIT:
        raise _Broken(f"tensor {name!r} has {axes} axes, more than the format's {AXES_LIMIT}")
    inner_first = [cursor.whole("u64", f"the shape of {name!r}") for _ in range(axes)]
    number = cursor.whole("u32", f"the type of {name!r}")
    offset = cursor.whole("u64", f"the offset of {name!r}")
    kind = _BY_NUMBER.get(number)
    if kind is None:
        raise _Broken(f"tensor {name!r} has type {number}, which is not known")
    shape = tuple(reversed(inner_first))
    if math.prod(shape) >= 1 << 60 or any(axis >= 1 << 60 for axis in shape):
        raise _Broken(f"tensor {name!r} has shape {list(shape)}")
    if kind.weights > 1 and (not shape or shape[-1] % kind.weights):
        raise _Broken(f"tensor {name!r} has shape {list(shape)}, which {kind.name} cannot store")
    return GgufTensor(name, kind.name, shape), offset


def _places(tensors: Mapping[str, tuple[GgufTensor, int]], begin: int, alignment: int, size: int) -> dict[str, Place]:
    """Where tensors lie, which must be one after the other without holes. Raises _Broken."""
    places: dict[str, Place] = {}
    cursor = begin
    for name, (tensor, offset) in sorted(tensors.items(), key=lambda each: (each[1][1], each[1][0].stored.nbytes)):
        place = Place(tensor.stored, begin + offset, begin + offset + tensor.stored.nbytes)
        if place.begin != cursor:
            what = "overlap" if place.begin < cursor else "leave a hole, or are not aligned,"
            raise _Broken(f"its tensors {what} before {name!r}")
        if place.end > size:
            raise _Broken(f"it should be {place.end} bytes long for {name!r} and has {size}: it is truncated")
        places[name] = place
        cursor = _padded(place.end, alignment)
    if size > cursor:
        raise _Broken(f"{size - cursor} bytes follow its last tensor")
    return {name: places[name] for name in tensors}


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def lay_out_gguf(name: str, metadata: Mapping[str, GgufValue], tensors: Sequence[GgufTensor]) -> ShardLayout:
    """One file before it exists, tensors in the order given; `io.safetensors.Shard` writes it.

    Raises GridError for what GGUF cannot hold: a name of more than 63 bytes, a shape its type does not divide.
    """
    alignment = metadata.get(ALIGNMENT_KEY, GgufValue("u32", ALIGNMENT)).value
    assert isinstance(alignment, int), ALIGNMENT_KEY
    parts = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), *_written(value)]
    offsets, cursor = [], 0
    for tensor in tensors:
        _check_tensor(tensor)
        parts += [_text(tensor.name), struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])]
        parts.append(struct.pack("<IQ", GGML_TYPES[tensor.type].number, cursor))
        offsets.append(cursor)
        cursor = _padded(cursor + tensor.stored.nbytes, alignment)
    header = b"".join(parts)
    header += bytes(_padded(len(header), alignment) - len(header))
    places = {
        tensor.name: Place(tensor.stored, len(header) + offset, len(header) + offset + tensor.stored.nbytes)
        for tensor, offset in zip(tensors, offsets, strict=True)
    }
    end = max((place.end for place in places.values()), default=len(header))
    return ShardLayout(name, header, places, tail=len(header) + cursor - end)


def _check_tensor(tensor: GgufTensor) -> None:
    kind = GGML_TYPES[tensor.type]
    if len(tensor.name.encode()) > NAME_LIMIT:
        raise GridError(f"GGUF holds names of {NAME_LIMIT} bytes, {tensor.name!r} is longer")
    if len(tensor.shape) > AXES_LIMIT or (kind.weights > 1 and (not tensor.shape or tensor.shape[-1] % kind.weights)):
        raise GridError(f"{tensor.name}: {tensor.type} stores rows of whole {kind.weights}s, not {list(tensor.shape)}")


def _text(text: str) -> bytes:
    raw = text.encode(errors="surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _written(value: GgufValue) -> list[bytes]:
    number, content = _KINDS.index(value.kind), value.value
    if isinstance(content, str):
        return [struct.pack("<I", number), _text(content)]
    if isinstance(content, tuple):
        return [struct.pack("<IIQ", _KINDS.index("arr"), number, len(content)), *map(_text, content)]
    stored = np.asarray(content).astype(_NUMPY[value.kind])
    if isinstance(content, np.ndarray):
        return [struct.pack("<IIQ", _KINDS.index("arr"), number, stored.size), stored.tobytes()]
    return [struct.pack("<I", number), stored.tobytes()]
