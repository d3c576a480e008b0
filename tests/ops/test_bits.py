"""Packing: inverse of unpacking, equal to a slow bit by bit text, and the kernels equal to the definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from roundel.errors import GridError
from roundel.ops.bits import pack_awq, pack_rows, unpack_awq, unpack_rows
from roundel.ops.numba.packing import pack_awq_columns, pack_columns, pack_nibbles
from roundel.ops.numba.unpacking import unpack_columns


def slow_pack(codes: list[int], bits: int) -> list[int]:
    """One row as one long little-endian number."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    words = len(codes) * bits // 32
    found = [(number >> (32 * w)) & 0xFFFFFFFF for w in range(words)]
    return [w - 2**32 if w >= 2**31 else w for w in found]


def random_codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows(bits: int) -> None:
    codes = random_codes(3, 96, bits)
    words = pack_rows(codes, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [slow_pack(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_rows(words, bits), codes)


def test_three_bits_are_gptq_words() -> None:
    """Word 0 holds codes 0..9 and the low two bits of code 10 (the classic 10 / 1 / 10 / 1 / 10)."""
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 10] = 0b110
    assert pack_rows(codes, 3).tolist() == [[-(2**31), 1, 0]]


def test_partial_words_are_refused() -> None:
    with pytest.raises(GridError):
        pack_rows(torch.zeros(1, 7, dtype=torch.uint8), 4)
    with pytest.raises(GridError):
        pack_awq(torch.zeros(1, 7, dtype=torch.uint8))


def test_awq_order() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[None]
    word = int(pack_awq(codes)) & 0xFFFFFFFF
    assert [(word >> (4 * p)) & 15 for p in range(8)] == [0, 2, 4, 6, 1, 3, 5, 7]
    many = random_codes(5, 64, 4)
    assert torch.equal(unpack_awq(pack_awq(many)), many)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_column_kernel(bits: int, rows: int) -> None:
    codes = random_codes(rows, 160, bits)
    words = np.full((160 * bits // 32, rows + 2), 7, np.uint32)
    pack_columns(codes.numpy().view(np.uint64), bits, words, 1)
    assert np.array_equal(words[:, 1:-1].view(np.int32), pack_rows(codes, bits).T.numpy())
    assert (words[:, 0] == 7).all()
    assert (words[:, -1] == 7).all()


@pytest.mark.parametrize("rows", [8, 136])
def test_awq_kernel(rows: int) -> None:
    codes = random_codes(rows, 100, 4)
    words = np.zeros((100, rows // 8 + 1), np.uint32)
    pack_awq_columns(codes.numpy(), words, 8)
    assert np.array_equal(words[:, 1:].view(np.int32), pack_awq(codes.T.contiguous()).numpy())


def test_nibble_kernel() -> None:
    from roundel.formats.mxfp import pack_nibbles as definition
    from roundel.formats.mxfp import unpack_nibbles

    codes = random_codes(5, 64, 4)
    packed = np.empty((5, 32), np.uint8)
    pack_nibbles(codes.numpy(), packed)
    assert np.array_equal(packed, definition(codes).numpy())
    assert torch.equal(unpack_nibbles(definition(codes)), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (16, 160), (37, 1056)])
def test_unpacking_kernel(bits: int, rows: int, columns: int) -> None:
    codes = random_codes(rows, columns, bits)
    words = np.ascontiguousarray(pack_rows(codes, bits).numpy().T).view(np.uint32)
    found = np.full((rows, columns), 255, np.uint8)
    for begin, end in ((0, rows // 2), (rows // 2, rows)):
        unpack_columns(words, bits, found[begin:end].view(np.uint64), begin)
    assert torch.equal(torch.from_numpy(found), codes)
