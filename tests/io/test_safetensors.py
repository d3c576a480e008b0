"""The header reader against files that lie, and the writer against the official reader."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from models.raw import raw_file
from roundel.errors import OutputError, QuantizationError, SourceError
from roundel.io.safetensors import HEADER_LIMIT, Place, Shard, lay_out, parse_header, raw_header
from roundel.tensor import ITEMSIZE, TensorSpec

FILE = "model-00002-of-00003.safetensors"


def entry(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def read(path: Path) -> dict[str, Place]:
    return parse_header(raw_header(path), path.stat().st_size, path.name)


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry(offsets=(16, 32)),
        "a": entry(),
        "none": entry(shape=(0, 3), offsets=(32, 32)),
    }
    path = raw_file(tmp_path / FILE, header, bytes(32))
    begin = path.stat().st_size - 32
    assert read(path) == {
        "b": Place(TensorSpec("b", "F32", (2, 2)), begin + 16, begin + 32),
        "a": Place(TensorSpec("a", "F32", (2, 2)), begin, begin + 16),
        "none": Place(TensorSpec("none", "F32", (0, 3)), begin + 32, begin + 32),
    }


NESTED = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
HUGE_INTEGER = b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}'


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b'{"a": \xff}', "not UTF-8"),
        (b"{'a': 1}", "not JSON"),
        (b"", "not JSON"),
        (NESTED, "not JSON"),
        (HUGE_INTEGER, "not JSON"),
        ([entry()], "not a JSON object"),
        ({"a": [1, 2]}, "described by list"),
        ({"a": {}}, "dtype None"),
        ({"a": entry(dtype="F3")}, "dtype 'F3'; known are BF16"),
        ({"a": entry(dtype=["F32"])}, "dtype"),
        ({"a": entry(shape=(-2, -2))}, "shape"),
        ({"a": entry(shape=(2.0, 2))}, "shape"),
        ({"a": entry(shape=(True, 4))}, "shape"),
        ({"a": entry(shape="22")}, "shape"),
        ({"a": entry(shape=(2**62, 4))}, "shape"),
        ({"a": entry(shape=(2**61,) * 4)}, "takes"),
        ({"a": entry(shape=(2**61,) * 1000)}, "shape"),
        ({"a": entry(shape=(1,) * 200_000)}, "shape"),
        ({"a": entry(offsets=(0, 16, 32))}, "data_offsets"),
        ({"a": entry(offsets=(16, 0))}, "takes 16 bytes and is given -16"),
        ({"a": entry(offsets=(-16, 0))}, "data_offsets"),
        ({"a": entry(offsets=(0.0, 16.0))}, "data_offsets"),
        ({"a": entry(offsets=(0, 20))}, "takes 16 bytes and is given 20"),
        ({"a": entry(), "b": entry()}, "overlap before 'b'"),
        ({"a": entry(), "b": entry(offsets=(12, 28))}, "overlap before 'b'"),
        ({"a": entry(), "b": entry(offsets=(20, 36))}, "leave a hole before 'b'"),
        ({"a": entry(offsets=(4, 20))}, "leave a hole before 'a'"),
        ({"a": entry(shape=(2, 4), offsets=(0, 32)), "b": entry(offsets=(32, 48))}, "truncated"),
        ({"a": entry(shape=(1, 2), offsets=(0, 8))}, "bytes follow its last tensor"),
        ({}, "bytes follow its last tensor"),
        (b'{"a":%(a)s,"a":%(a)s}' % {b"a": json.dumps(entry()).encode()}, "names 'a' twice"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}', "names 'dtype' twice"),
        (b'{"\\ud800":%s}' % json.dumps(entry()).encode(), "not UTF-8"),
    ],
)  # fmt: skip
def test_a_false_header_is_named(header: object, why: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=why) as found:
        read(raw_file(tmp_path / FILE, header, bytes(16)))
    assert str(found.value).startswith(f"{FILE} cannot be read: ") and "Fetch or copy the file again." in str(
        found.value
    )
    assert len(str(found.value)) < 1000


@pytest.mark.parametrize("depth", range(200, 1100, 25))
def test_no_depth_of_nesting_ends_otherwise(depth: int, tmp_path: Path) -> None:
    shape = b"[" * depth + b"]" * depth
    with pytest.raises(SourceError):
        read(raw_file(tmp_path / FILE, b'{"a":{"dtype":"F32","shape":%s,"data_offsets":[0,16]}}' % shape, bytes(16)))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "0 bytes long"),
        (b"\x10\0\0", "3 bytes long"),
        (struct.pack("<Q", 100) + b"{}", "claims 100 bytes and the file has 10"),
        (struct.pack("<Q", HEADER_LIMIT + 1) + b"{}", "more than the format's limit of 100000000"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "more than the format's limit"),
        (b"PK\x03\x04" + bytes(60), "claims"),
    ],
)
def test_a_header_that_does_not_fit_its_file(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(content)
    with pytest.raises(SourceError, match=why) as found:
        read(path)
    assert FILE in str(found.value)


def test_a_huge_claim_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(struct.pack("<Q", HEADER_LIMIT + 8))
    os.truncate(path, 4 * HEADER_LIMIT)  # sparse: as long as it claims to be
    with pytest.raises(SourceError, match="more than the format's limit"):
        read(path)


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    chance = random.Random(7)
    header = {
        "__metadata__": {"format": "pt"},
        "w": entry("BF16", (4, 8), (0, 64)),
        "n": entry("F32", (4,), (64, 80)),
        "é": entry("I64", (), (80, 88)),
    }
    sound = raw_file(tmp_path / "sound", header, bytes(88)).read_bytes()
    words = [
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b"-",
        b"1e9",
        b"\xff",
        b"\\u0000",
        b"null",
        b"true",
        b"0",
        b"9" * 30,
        b'"n":',
    ]
    mutations: tuple[Callable[[bytearray], object], ...] = (
        lambda raw: raw.__setitem__(chance.randrange(len(raw)), chance.randrange(256)),
        lambda raw: raw.__delitem__(slice(at := chance.randrange(len(raw)), at + chance.randrange(1, 9))),
        lambda raw: raw.__setitem__(
            slice(at := chance.randrange(8, 100), at + chance.randrange(3)), chance.choice(words)
        ),
        lambda raw: raw.extend(bytes(chance.randrange(1, 9))),
        lambda raw: raw.__setitem__(slice(0, 8), struct.pack("<Q", chance.choice([0, 1, 9, len(raw) - 8, 2**63]))),
    )
    path, refused = tmp_path / FILE, 0
    for _ in range(300):
        raw = bytearray(sound)
        for _ in range(chance.randrange(1, 4)):
            chance.choice(mutations)(raw)
        path.write_bytes(raw)
        try:
            read(path)
        except SourceError as error:
            assert FILE in str(error)
            refused += 1
    assert refused > 200


def specs() -> list[TensorSpec]:
    return [
        TensorSpec("a.weight", "BF16", (3, 5)),
        TensorSpec("a.qweight", "I32", (4, 7)),
        TensorSpec("a.codes", "U8", (13,)),
        TensorSpec("ü.scale", "F32", (3,)),
        TensorSpec("one", "I64", ()),
        TensorSpec("empty", "F16", (0, 4)),
        TensorSpec("b.weight", "BF16", (16, 16)),
    ]


def content(spec: TensorSpec) -> bytes:
    return random.Random(spec.name).randbytes(spec.nbytes)


def test_a_layout_is_exact_and_aligned() -> None:
    (layout,) = lay_out(specs(), 10**9)
    assert layout.name == "model.safetensors" and layout.nbytes == len(layout.header) + sum(s.nbytes for s in specs())
    assert parse_header(layout.header, layout.nbytes, layout.name) == layout.places
    assert all(p.begin % ITEMSIZE[p.spec.dtype] == 0 for p in layout.places.values())
    assert len(layout.header) % 8 == 0


@pytest.mark.parametrize("limit", [1, 100, 200, 512, 700, 10**6])
def test_shards_keep_the_order_and_the_limit(limit: int) -> None:
    layouts = lay_out(specs(), limit)
    names = [layout.name for layout in layouts]
    if len(names) > 1:
        assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    assert sorted(n for layout in layouts for n in layout.places) == sorted(s.name for s in specs())
    order, cursor = [s.name for s in specs()], 0
    for layout in layouts:
        count = len(layout.places)
        assert set(layout.places) == set(order[cursor : cursor + count])
        assert (
            layout.nbytes - len(layout.header) <= limit
            or count == 1
            or layout.nbytes == len(layout.header) + max(p.spec.nbytes for p in layout.places.values())
        )
        cursor += count


def test_no_tensors_make_a_file_of_a_header(tmp_path: Path) -> None:
    (layout,) = lay_out([], 100)
    Shard(tmp_path, layout).finish()
    assert read(tmp_path / "model.safetensors") == {}


def test_the_official_reader_opens_what_was_put_in_any_order(tmp_path: Path) -> None:
    for layout in lay_out(specs(), 512):
        shard = Shard(tmp_path, layout)
        assert not shard.path.exists() and shard.partial.exists()
        halves = [(p.spec, half) for p in layout.places.values() for half in (0, 1)]
        random.Random(3).shuffle(halves)

        def put(piece: tuple[TensorSpec, int], shard: Shard = shard) -> None:
            spec, half = piece
            middle = spec.nbytes // 2
            shard.put(spec.name, memoryview(content(spec)[middle:] if half else content(spec)[:middle]), middle * half)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(put, halves))
        shard.flush()
        shard.finish()
        assert shard.path.exists() and not shard.partial.exists()
        with safe_open(shard.path, "numpy") as found:
            assert found.metadata() == {"format": "pt"} and set(found.keys()) == set(layout.places)
        raw = shard.path.read_bytes()
        for place in layout.places.values():
            assert raw[place.begin : place.end] == content(place.spec)


def test_values_arrive_as_the_official_reader_sees_them(tmp_path: Path) -> None:
    (layout,) = lay_out([TensorSpec("x", "F32", (2, 3)), TensorSpec("y", "I32", (4,))], 10**9)
    x, y = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.int32)
    shard = Shard(tmp_path, layout)
    shard.put("y", y.tobytes())
    shard.put("x", x.tobytes())
    shard.finish()
    with safe_open(shard.path, "numpy") as found:
        assert np.array_equal(found.get_tensor("x"), x) and np.array_equal(found.get_tensor("y"), y)


@pytest.mark.parametrize("refused", [False, True], ids=["in the kernel", "through a buffer"])
def test_copying_from_file_to_file(refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if refused:

        def refuse(*_: object) -> int:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    spec = TensorSpec("x", "U8", (3_000_001,))
    (tmp_path / "source").write_bytes(b"??" + content(spec) + b"??")
    (layout,) = lay_out([spec], 10**9)
    shard = Shard(tmp_path, layout)
    with (tmp_path / "source").open("rb") as source:
        shard.copy("x", source.fileno(), 2)
    shard.finish()
    place = layout.places["x"]
    assert shard.path.read_bytes()[place.begin :] == content(spec)


def test_a_source_that_ends_early_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"too short")
    (layout,) = lay_out([TensorSpec("x", "U8", (100,))], 10**9)
    shard = Shard(tmp_path, layout)
    with (tmp_path / "source").open("rb") as source, pytest.raises(SourceError, match="ended early"):
        shard.copy("x", source.fileno(), 0)
    shard.close()


def test_a_partial_file_keeps_its_bytes(tmp_path: Path) -> None:
    (layout,) = lay_out(specs(), 10**9)
    first = Shard(tmp_path, layout)
    first.put("b.weight", content(layout.places["b.weight"].spec))
    first.close()
    again = Shard(tmp_path, layout)
    for place in layout.places.values():
        if place.spec.name != "b.weight":
            again.put(place.spec.name, content(place.spec))
    again.finish()
    raw = again.path.read_bytes()
    assert all(raw[p.begin : p.end] == content(p.spec) for p in layout.places.values())


def test_a_partial_file_of_another_length_is_begun_anew(tmp_path: Path) -> None:
    (layout,) = lay_out(specs(), 10**9)
    (tmp_path / "model.safetensors.partial").write_bytes(b"x" * 99)
    shard = Shard(tmp_path, layout)
    shard.finish()
    assert shard.path.stat().st_size == layout.nbytes
    assert shard.path.read_bytes().strip(b"\0") == layout.header.strip(b"\0")


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fdatasync", "fsync"])
def test_a_full_disk_is_an_output_error(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    (layout,) = lay_out(specs(), 10**9)
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match=r"No space left on device.*[Ff]ree the disk"):
        shard = Shard(tmp_path, layout)
        shard.put("one", bytes(8))
        shard.flush()
        shard.finish()


def test_errors_are_of_our_tree() -> None:
    assert issubclass(SourceError, QuantizationError) and issubclass(OutputError, QuantizationError)
