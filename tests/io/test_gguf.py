"""The GGUF reader against files that lie, and the layout against the reader."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from roundel.errors import GridError, SourceError
from roundel.io.gguf import GGML_TYPES, GgufHeader, GgufTensor, GgufValue, lay_out_gguf, read_gguf, read_tensor
from roundel.io.safetensors import Shard

FILE = "model-Q4_K.gguf"


def metadata() -> dict[str, GgufValue]:
    return {
        "general.architecture": GgufValue("str", "llama"),
        "general.quantization_version": GgufValue("u32", 2),
        "llama.rope.freq_base": GgufValue("f32", 10000.0),
        "tokenizer.ggml.add_bos_token": GgufValue("bool", True),
        "tokenizer.ggml.tokens": GgufValue("str", ("<s>", "ü", "", "\udcff")),
        "tokenizer.ggml.scores": GgufValue("f32", np.array([0.0, -1.5, 2.0, 3.0], "<f4")),
        "tokenizer.ggml.token_type": GgufValue("i32", np.array([3, 1, 1, 6], "<i4")),
        "negative": GgufValue("i64", -(2**40)),
        "fine": GgufValue("f64", 1e-300),
        "none": GgufValue("str", ()),
    }


def tensors() -> list[GgufTensor]:
    return [
        GgufTensor("token_embd.weight", "Q4_K", (3, 512)),
        GgufTensor("blk.0.attn_norm.weight", "F32", (7,)),
        GgufTensor("blk.0.ffn_gate_exps.weight", "Q8_0", (2, 3, 64)),
        GgufTensor("output.weight", "BF16", (2, 5)),
        GgufTensor("empty", "F16", (0, 32)),
    ]


def content(tensor: GgufTensor) -> bytes:
    return random.Random(tensor.name).randbytes(tensor.stored.nbytes)


def written(folder: Path, values: dict[str, GgufValue] | None = None) -> Path:
    layout = lay_out_gguf(FILE, metadata() if values is None else values, tensors())
    shard = Shard(folder, layout)
    order = tensors()
    random.Random(1).shuffle(order)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda tensor: shard.put(tensor.name, content(tensor)), order))
    shard.finish()
    assert (folder / FILE).stat().st_size == layout.nbytes
    return folder / FILE


def assert_same_values(left: GgufHeader, values: dict[str, GgufValue]) -> None:
    assert list(left.metadata) == list(values)
    for key, value in values.items():
        found = left.metadata[key]
        assert found.kind == value.kind
        assert found.is_array == value.is_array
        same = np.array_equal(found.value, value.value) if isinstance(value.value, np.ndarray) else None  # type: ignore[arg-type]
        assert found.value == value.value if same is None else same, key


@pytest.mark.parametrize("alignment", [None, 64])
def test_what_is_put_is_read(alignment: int | None, tmp_path: Path) -> None:
    values = metadata() | ({} if alignment is None else {"general.alignment": GgufValue("u32", alignment)})
    path = written(tmp_path, values)
    header = read_gguf(path)
    assert_same_values(header, values)
    assert list(header.tensors.values()) == tensors()
    for tensor in tensors():
        place = header.places[tensor.name]
        assert place.spec == tensor.stored
        assert place.begin % (alignment or 32) == 0
        assert read_tensor(path, place).tobytes() == content(tensor)
    assert path.stat().st_size % (alignment or 32) == 0


def test_nothing_is_a_file_too(tmp_path: Path) -> None:
    shard = Shard(tmp_path, lay_out_gguf(FILE, {}, []))
    shard.finish()
    header = read_gguf(tmp_path / FILE)
    assert not header.metadata
    assert not header.tensors


def test_what_gguf_cannot_hold_is_refused() -> None:
    with pytest.raises(GridError, match="63 bytes"):
        lay_out_gguf(FILE, {}, [GgufTensor("n" * 64, "F32", (1,))])
    with pytest.raises(GridError, match="whole 256s"):
        lay_out_gguf(FILE, {}, [GgufTensor("n", "Q4_K", (4, 100))])


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def raw(
    values: bytes = b"", infos: bytes = b"", counts: tuple[int, int] = (0, 0), data: bytes = b"", version: int = 3
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, counts[0], counts[1]) + values + infos
    return head + bytes(-len(head) % 32) + data


def info(name: bytes = b"w", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


U32 = struct.pack("<II", 4, 7)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "does not begin"),
        (b"GGML" + bytes(40), "does not begin"),
        (raw(version=1), "version 1"),
        (raw(version=0x03000000), "big-endian"),
        (raw(counts=(2**60, 0)), "can hold"),
        (raw(counts=(0, 2**63)), "can hold"),
        (raw(text(b"k") + U32 + text(b"k") + U32, counts=(0, 2)), "'k' twice"),
        (raw(text(b"") + U32, counts=(0, 1)), "empty"),
        (raw(text(b"\xff") + U32, counts=(0, 1)), "not UTF-8"),
        (raw(text(b"k") + struct.pack("<II", 13, 0), counts=(0, 1)), "type 13"),
        (raw(struct.pack("<Q", 2**40) + bytes(9), counts=(0, 1)), "format's limit"),
        (raw(text(b"k") + struct.pack("<IQ", 8, 2**50), counts=(0, 1)), "are left"),
        (raw(text(b"k") + struct.pack("<IIQ", 9, 8, 2**61), counts=(0, 1)), "claims"),
        (raw(text(b"k") + struct.pack("<IIQ", 9, 4, 2**61), counts=(0, 1)), "claims"),
        (raw(text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(30), counts=(0, 1)), "array of arrays"),
        (raw(text(b"k") + struct.pack("<IB", 7, 2), counts=(0, 1)), "neither true nor false"),
        (raw(text(b"general.alignment") + struct.pack("<II", 4, 48), counts=(0, 1)), "power of two"),
        (raw(text(b"general.alignment") + struct.pack("<II", 4, 0), counts=(0, 1)), "power of two"),
        (raw(infos=info(shape=(1,) * 5), counts=(1, 0)), "5 axes"),
        (raw(infos=info(kind=4), counts=(1, 0)), "type 4"),
        (raw(infos=info(shape=(100,), kind=12), counts=(1, 0)), "Q4_K cannot store"),
        (raw(infos=info(shape=(), kind=12), counts=(1, 0)), "Q4_K cannot store"),
        (raw(infos=info(shape=(2**32, 2**32)), counts=(1, 0)), "has shape"),
        (raw(infos=info(shape=(0, 2**63)), counts=(1, 0)), "has shape"),
        (raw(infos=info() + info(), counts=(2, 0), data=bytes(64)), "'w' twice"),
        (raw(infos=info(), counts=(1, 0), data=bytes(31)), "truncated"),
        (raw(infos=info(offset=8), counts=(1, 0), data=bytes(64)), "not aligned"),
        (raw(infos=info(offset=64), counts=(1, 0), data=bytes(128)), "leave a hole"),
        (raw(infos=info() + info(b"v"), counts=(2, 0), data=bytes(64)), "overlap"),
        (raw(infos=info(offset=2**64 - 32), counts=(1, 0), data=bytes(64)), "leave a hole"),
        (raw(infos=info(), counts=(1, 0), data=bytes(65)), "follow its last"),
    ],
)
def test_a_false_header_is_named(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(content)
    with pytest.raises(SourceError, match=why) as caught:
        read_gguf(path)
    assert FILE in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        read_gguf(tmp_path / FILE)


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    """For two seconds: no crash, no hang, and no more memory than some times the file."""
    chance = random.Random(11)
    sound = written(tmp_path).read_bytes()
    end = len(lay_out_gguf(FILE, metadata(), tensors()).header)
    numbers = (0, 1, 2, 13, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
    mutations: tuple[Callable[[bytearray], object], ...] = (
        lambda data: data.__setitem__(chance.randrange(end), chance.randrange(256)),
        lambda data: data.__delitem__(slice(at := chance.randrange(end), at + chance.randrange(1, 9))),
        lambda data: data.__setitem__(
            slice(at := chance.randrange(end), at + 8), struct.pack("<Q", chance.choice(numbers))
        ),
        lambda data: data.__setitem__(
            slice(at := chance.randrange(end), at + 4), struct.pack("<Q", chance.choice(numbers))[:4]
        ),
        lambda data: data.__setitem__(slice(at := chance.randrange(end), at), data[at : at + chance.randrange(40)]),
        lambda data: data.__delitem__(slice(chance.randrange(len(data)), None)),
    )
    path, refused, tried = tmp_path / "fuzzed", 0, 0
    stop = time.monotonic() + 2
    tracemalloc.start()
    while time.monotonic() < stop or tried < 300:
        data = bytearray(sound)
        for _ in range(chance.randrange(1, 4)):
            if data[:end]:
                chance.choice(mutations)(data) if len(data) > end else data.append(0)
        path.write_bytes(data)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            header = read_gguf(path)
            for tensor in header.tensors:
                assert header.places[tensor].end <= len(data)
        except SourceError as error:
            assert "fuzzed" in str(error)
            refused += 1
        assert tracemalloc.get_traced_memory()[1] - before < 20 * len(sound) + (1 << 18)
        tried += 1
    tracemalloc.stop()
    assert refused > tried // 2


def test_block_sizes_fit_the_types() -> None:
    assert {each.number for each in GGML_TYPES.values()} == {
        *(0, 1, 2, 3, 6, 7, 8), *range(10, 15), *range(16, 31), 34, 35, 39, 40
    }  # fmt: skip
