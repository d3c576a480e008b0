"""Files of importances: both layouts against writers of their own, and against files that lie."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from roundel.errors import SourceError
from roundel.io.gguf import GgufTensor, GgufValue, lay_out_gguf
from roundel.io.imatrix import lay_out_imatrix, legacy_imatrix, read_imatrix
from roundel.io.safetensors import Shard

DOWN, EXPERTS = "blk.0.ffn_down.weight", "blk.1.ffn_up_exps.weight"
SUMS = {DOWN: np.arange(1, 9, dtype="<f4").reshape(1, 8), EXPERTS: np.arange(12, dtype="<f4").reshape(3, 4) + 1}
COUNTS = {DOWN: np.array([[16.0]], "<f4"), EXPERTS: np.array([[4.0], [0.0], [8.0]], "<f4")}


def modern(folder: Path, extra: dict[str, np.ndarray] | None = None) -> Path:
    """As llama-imatrix writes it, its newer versions with sums beside the sums of squares."""
    arrays = {f"{name}{end}": each[name] for name in SUMS for end, each in ((".in_sum2", SUMS), (".counts", COUNTS))}
    arrays |= {f"{DOWN}.in_sum": SUMS[DOWN]} | (extra or {})
    values = {"general.type": GgufValue("str", "imatrix"), "imatrix.chunk_count": GgufValue("u32", 2)}
    tensors = [GgufTensor(name, "F32", each.shape) for name, each in arrays.items()]
    shard = Shard(folder, lay_out_gguf("imatrix.gguf", values, tensors))
    for name, each in arrays.items():
        shard.put(name, each.tobytes())
    shard.finish()
    return folder / "imatrix.gguf"


def entry(name: bytes, calls: int, values: np.ndarray) -> bytes:
    return struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, values.size) + values.astype("<f4").tobytes()


def legacy(*entries: bytes, tail: bytes = b"") -> bytes:
    return struct.pack("<i", len(entries)) + b"".join(entries) + tail


def test_sums_are_divided_by_counts(tmp_path: Path) -> None:
    found = read_imatrix(modern(tmp_path))
    assert set(found.entries) == {DOWN, EXPERTS} and not found.legacy
    down = found.of(DOWN, 8)
    assert down.tokens == 16 and np.array_equal(down.mean_square, SUMS[DOWN][0] / 16)
    third = found.of(EXPERTS, 4, 2, 3)
    assert third.tokens == 8 and np.array_equal(third.mean_square, SUMS[EXPERTS][2] / 8)
    silent = found.of(EXPERTS, 4, 1, 3)
    assert silent.tokens == 0 and np.array_equal(silent.mean_square, np.ones(4, np.float32))


def test_the_legacy_layout_holds_means_times_calls(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    tail = struct.pack("<ii", 5, 8) + b"text.txt"
    path.write_bytes(legacy(entry(DOWN.encode(), 4, SUMS[DOWN]), entry(EXPERTS.encode(), 2, SUMS[EXPERTS]), tail=tail))
    found = read_imatrix(path)
    assert found.legacy and np.array_equal(found.of(DOWN, 8).mean_square, SUMS[DOWN][0] / 4)
    assert np.array_equal(found.of(EXPERTS, 4, 1, 3).mean_square, SUMS[EXPERTS][1] / 2)
    assert found.of(DOWN, 8).tokens is None


def test_what_is_written_is_read_in_both_layouts(tmp_path: Path) -> None:
    layout = lay_out_imatrix("own.gguf", {DOWN: (1, 8), EXPERTS: (3, 4)}, ["text.txt"], 2, 8)
    shard = Shard(tmp_path, layout)
    for name in SUMS:
        shard.put(f"{name}.in_sum2", SUMS[name].tobytes())
        shard.put(f"{name}.counts", COUNTS[name].tobytes())
    shard.finish()
    own, theirs = read_imatrix(tmp_path / "own.gguf"), read_imatrix(modern(tmp_path))
    old = tmp_path / "own.dat"
    old.write_bytes(legacy_imatrix(own, 2, 8, "text.txt"))
    for matrix, (name, width, count) in enumerate(((DOWN, 8, 1), (EXPERTS, 4, 3), (EXPERTS, 4, 3))):
        found, wanted, legacy_found = (each.of(name, width, matrix and matrix - 1, count) for each in
                                       (own, theirs, read_imatrix(old)))  # fmt: skip
        assert found.tokens == wanted.tokens and np.array_equal(found.mean_square, wanted.mean_square)
        np.testing.assert_allclose(legacy_found.mean_square, wanted.mean_square, rtol=1e-6)


def test_another_model_s_sizes_are_named(tmp_path: Path) -> None:
    found = read_imatrix(modern(tmp_path))
    with pytest.raises(SourceError, match=r"8 importances for .*, which has 16 columns"):
        found.of(DOWN, 16)
    with pytest.raises(SourceError, match="2 experts of 6 columns"):
        found.of(EXPERTS, 6, 0, 2)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "ends before its count"),
        (struct.pack("<i", 0), "its count of entries is 0"),
        (struct.pack("<i", 1 << 30), "more than 4 bytes"),
        (struct.pack("<iii", 1, 1 << 30, 0) + bytes(8), "1073741824 bytes long"),
        (legacy(struct.pack("<i", -5) + bytes(20)), "the length of a name is -5"),
        (legacy(entry(b"\xff\xfe", 1, SUMS[DOWN])), "not UTF-8"),
        (legacy(entry(b"a", 1, SUMS[DOWN]))[:-4], "claims 8 values"),
        (legacy(entry(b"a", 1, SUMS[DOWN]), entry(b"a", 1, SUMS[DOWN])), "twice"),
        (legacy(entry(b"a", -1, SUMS[DOWN])), "calls of 'a' is -1"),
        (legacy(entry(b"a", 1, SUMS[DOWN]), tail=struct.pack("<ii", 1, 99)), "99 bytes long"),
        (legacy(entry(b"a", 1, SUMS[DOWN]), tail=struct.pack("<ii", 1, 0) + b"more"), "4 bytes follow"),
    ],
)
def test_a_false_legacy_file_is_named(content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "imatrix.dat").write_bytes(content)
    with pytest.raises(SourceError, match=why):
        read_imatrix(tmp_path / "imatrix.dat")


def test_a_false_gguf_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no counts"):
        read_imatrix(modern(tmp_path, {"lone.weight.in_sum2": SUMS[DOWN]}))
    with pytest.raises(SourceError, match="5 sums and 2 counts"):
        read_imatrix(modern(tmp_path, {"x.in_sum2": np.ones((1, 5), "<f4"), "x.counts": np.ones((2, 1), "<f4")}))
    with pytest.raises(SourceError, match="counts that are negative"):
        read_imatrix(modern(tmp_path, {"x.in_sum2": np.ones((1, 4), "<f4"), "x.counts": -np.ones((1, 1), "<f4")}))
    broken = read_imatrix(
        modern(tmp_path, {"x.in_sum2": np.full((1, 4), np.nan, "<f4"), "x.counts": np.ones((1, 1), "<f4")})
    )
    with pytest.raises(SourceError, match="no numbers"):
        broken.of("x", 4)
    with pytest.raises(SourceError, match="without importances"):
        shard = Shard(tmp_path, lay_out_gguf("empty.gguf", {}, []))
        shard.finish()
        read_imatrix(tmp_path / "empty.gguf")
    with pytest.raises(SourceError, match="cannot be read"):
        read_imatrix(tmp_path)


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    tail = struct.pack("<ii", 5, 4) + b"text"
    seeds = [modern(tmp_path).read_bytes(), legacy(*(entry(n.encode(), 4, SUMS[n]) for n in SUMS), tail=tail)]
    drawn, path, tried, refused = random.Random(5), tmp_path / "fuzzed", 0, 0
    begun = time.monotonic()
    tracemalloc.start()
    for _ in range(3000):
        tried += 1
        content = bytearray(drawn.choice(seeds))
        for _ in range(drawn.randint(1, 4)):
            content[drawn.randrange(len(content))] = drawn.choice((0, 1, 127, 255, drawn.randrange(256)))
        if drawn.random() < 0.3:
            del content[drawn.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            found = read_imatrix(path)
            for name, each in found.entries.items():
                found.of(name, each.size)
        except SourceError:
            refused += 1
        if time.monotonic() - begun > 10:
            break
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tried > 100 and refused > tried // 4 and peak < 4 << 20
