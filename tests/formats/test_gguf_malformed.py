"""GGUF files that are damaged or say senseless things, opened as checkpoints: each is read or refused."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.test_gguf_golden import GOLDEN
from roundel.checkpoint import open_checkpoint
from roundel.errors import GridError, QuantizationError, SourceError
from roundel.inference.loading import load
from roundel.inspection import inspect_checkpoint
from roundel.io.gguf import GGML_TYPES, GgufTensor, GgufValue, lay_out_gguf, read_gguf, read_tensor
from roundel.io.safetensors import Shard
from roundel.verification import verify

NUMBERS = (0, 1, 2, 13, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
JUNK = (
    *(GgufValue("u32", number) for number in (0, 1, 3, 2**31, 2**32 - 1)),
    *(GgufValue("f32", number) for number in (0.0, -1.0, 1e30, float("inf"), float("nan"))),
    *(GgufValue("str", text) for text in ("", "llama", "yarn", "gpt2", "\udcff")),
    *(GgufValue("bool", flag) for flag in (True, False)),
    *(GgufValue("i32", np.array(numbers, "<i4")) for numbers in ([], [1], [3, -1, 7])),
    GgufValue("str", ("a", "b")),
)


def openings(path: Path) -> None:
    """Everything that reads a file."""
    checkpoint = open_checkpoint(path)
    try:
        inspect_checkpoint(checkpoint)
        checkpoint.source.small_folder()
    finally:
        checkpoint.close()
    verify(path)


def survived(path: Path, read: Callable[[Path], Any], size: int) -> bool:
    """Whether a file was refused. Fails where it is neither, or takes memory beyond what its size explains.

    What the first reading of a kind imports and compiles is not the file's: one that took too much is read again.
    """
    allowed = 40 * size + (1 << 22)
    refused, taken = _read(path, read)
    if taken >= allowed:
        refused, taken = _read(path, read)
    assert taken < allowed
    return refused


def _read(path: Path, read: Callable[[Path], Any]) -> tuple[bool, int]:
    """Whether a file was refused, and the bytes at the peak of reading it."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    refused = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a tokenizer that cannot be made
            read(path)
    except GridError as error:
        pytest.fail(str(error))
    except QuantizationError as error:
        assert str(error)
        refused = True
    return refused, tracemalloc.get_traced_memory()[1] - before


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    """Bytes changed, left out, put in or cut off, for four seconds."""
    chance = random.Random(3)
    sound = (GOLDEN / "q4_0.gguf").read_bytes()
    end = min(place.begin for place in read_gguf(GOLDEN / "q4_0.gguf").places.values())
    mutations: tuple[Callable[[bytearray], object], ...] = (
        lambda data: data.__setitem__(chance.randrange(len(data)), chance.randrange(256)),
        lambda data: data.__setitem__(chance.randrange(end), chance.randrange(256)),
        lambda data: data.__delitem__(slice(at := chance.randrange(end), at + chance.randrange(1, 9))),
        lambda data: data.__setitem__(
            slice(at := chance.randrange(end), at + 8), struct.pack("<Q", chance.choice(NUMBERS))
        ),
        lambda data: data.__setitem__(
            slice(at := chance.randrange(end), at + 4), struct.pack("<Q", chance.choice(NUMBERS))[:4]
        ),
        lambda data: data.__delitem__(slice(chance.randrange(len(data)), None)),
    )
    path, tried, refused = tmp_path / "fuzzed.gguf", 0, 0
    openings(GOLDEN / "q4_0.gguf")
    stop = time.monotonic() + 4
    tracemalloc.start()
    while time.monotonic() < stop or tried < 60:
        data = bytearray(sound)
        for _ in range(chance.randrange(1, 4)):
            if len(data) > end:
                chance.choice(mutations)(data)
        path.write_bytes(data)
        refused += survived(path, openings, len(sound))
        tried += 1
    tracemalloc.stop()
    assert tried // 4 < refused < tried


@pytest.mark.parametrize("mixture", ["q4_0", "mxfp4_moe"])
def test_senseless_files_are_read_or_refused(mixture: str, tmp_path: Path) -> None:
    """Sound files whose values, names, types and shapes are others, for five seconds; they are loaded, too."""
    chance = random.Random(8)
    original = GOLDEN / f"{mixture}.gguf"
    header = read_gguf(original)
    contents = {name: read_tensor(original, place).tobytes() for name, place in header.places.items()}
    path, tried, refused = tmp_path / "fuzzed.gguf", 0, 0
    load(original)  # what is imported and compiled is not counted
    openings(original)
    stop = time.monotonic() + 5
    tracemalloc.start()
    while time.monotonic() < stop or tried < 40:
        values = dict(header.metadata)
        tensors = {name: (tensor, contents[name]) for name, tensor in header.tensors.items()}
        for _ in range(chance.randrange(1, 3)):
            action, name = chance.randrange(6), chance.choice(list(tensors))
            tensor, content = tensors[name]
            if action == 0:
                values[chance.choice(list(values))] = chance.choice(JUNK)
            elif action == 1:
                values.pop(chance.choice(list(values)), None)
            elif action == 2:
                tensors.pop(name)
            elif action == 3:
                to = chance.choice(["", "x", "blk.0.attn_q", "blk.99.attn_q.weight", "output.weight", "output.bias"])
                tensors[name] = GgufTensor(to, tensor.type, tensor.shape), content
            elif action == 4:
                shapes = [(), (0,), (0, 32), tensor.shape[::-1], (1, *tensor.shape), (2**20, 0, 32), (64,), (32, 64)]
                tensors[name] = sized(GgufTensor(name, tensor.type, chance.choice(shapes)))
            else:
                tensors[name] = sized(GgufTensor(name, chance.choice(list(GGML_TYPES)), tensor.shape))
        listed = {tensor.name: (tensor, content) for tensor, content in tensors.values()}
        try:
            layout = lay_out_gguf(path.name, values, [tensor for tensor, _ in listed.values()])
        except (GridError, AssertionError, ValueError, KeyError):
            continue  # what cannot even be written
        shard = Shard(tmp_path, layout)
        for name, (_, content) in listed.items():
            shard.put(name, content)
        shard.finish()
        refused += survived(path, load if tried % 2 else openings, path.stat().st_size)
        tried += 1
    tracemalloc.stop()
    assert tried // 8 < refused < tried


def sized(tensor: GgufTensor) -> tuple[GgufTensor, bytes]:
    """A tensor of zeros. Raises KeyError for a shape that its type does not divide."""
    if GGML_TYPES[tensor.type].weights > 1 and (not tensor.shape or tensor.shape[-1] % GGML_TYPES[tensor.type].weights):
        return GgufTensor(tensor.name, "F32", (2,)), bytes(8)
    count = 1
    for axis in tensor.shape:
        count *= axis
    kind = GGML_TYPES[tensor.type]
    return tensor, bytes(count // kind.weights * kind.nbytes)


def test_types_with_codebooks_are_refused_by_name(tmp_path: Path) -> None:
    header = read_gguf(GOLDEN / "q2_k.gguf")
    listed = [
        GgufTensor(t.name, "IQ2_XS" if t.name == "blk.0.ffn_up.weight" else t.type, t.shape)
        for t in header.tensors.values()
    ]
    layout = lay_out_gguf("other.gguf", header.metadata, listed)
    Shard(tmp_path, layout).finish()
    with pytest.raises(SourceError, match=r"blk.0.ffn_up.weight is of the type IQ2_XS; read are F32"):
        open_checkpoint(tmp_path / "other.gguf")
