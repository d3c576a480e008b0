"""Laying stored numbers into the bytes of blocks, in numba: `formats.gguf.block_types` with the same bytes."""

from __future__ import annotations

import numba
import numpy as np

__all__ = ["place_bytes", "place_plane", "place_six_bits"]

_jit = numba.njit(cache=True, nogil=True, error_model="numpy", boundscheck=False)


@_jit
def _merge(line, count, stride, bits, first, into):  # type: ignore[no-untyped-def]
    """count bytes, each of 8 / bits numbers `stride` apart."""
    low = np.uint8((1 << bits) - 1)
    shift = np.uint8(first)
    if bits == 4:
        for i in range(count):
            a, b = (line[i] >> shift) & low, (line[i + stride] >> shift) & low
            into[i] = np.uint8(a | np.uint8(b << np.uint8(4)))
    elif bits == 2:
        for i in range(count):
            a, b = (line[i] >> shift) & low, (line[i + stride] >> shift) & low
            c, d = (line[i + 2 * stride] >> shift) & low, (line[i + 3 * stride] >> shift) & low
            into[i] = np.uint8(
                np.uint8(a | np.uint8(b << np.uint8(2)))
                | np.uint8(np.uint8(c << np.uint8(4)) | np.uint8(d << np.uint8(6)))
            )
    else:
        for i in range(count):
            into[i] = np.uint8(0)
        for k in range(8):
            place = np.uint8(k)
            for i in range(count):
                into[i] |= np.uint8(((line[i + k * stride] >> shift) & low) << place)


@_jit
def place_plane(numbers, bits, span, first, begin, packed):  # type: ignore[no-untyped-def]
    """numbers [blocks, n] uint8 -> packed[:, begin : begin + n * bits / 8]; see `formats.gguf.block_types.Plane`."""
    count = span * bits // 8
    for block in range(numbers.shape[0]):
        for chunk in range(numbers.shape[1] // span):
            at = begin + chunk * count
            line = numbers[block, chunk * span : (chunk + 1) * span]
            _merge(line, count, count, bits, first, packed[block, at : at + count])


@_jit
def place_six_bits(levels, low_levels, begin, packed):  # type: ignore[no-untyped-def]
    """levels, low_levels [blocks, 8] uint8 -> packed[:, begin : begin + 12]"""
    for block in range(levels.shape[0]):
        for j in range(4):
            a, b = levels[block, j + 4], low_levels[block, j + 4]
            packed[block, begin + j] = levels[block, j] | np.uint8((a >> np.uint8(4)) << np.uint8(6))
            packed[block, begin + 4 + j] = low_levels[block, j] | np.uint8((b >> np.uint8(4)) << np.uint8(6))
            packed[block, begin + 8 + j] = np.uint8(a & np.uint8(15)) | np.uint8((b & np.uint8(15)) << np.uint8(4))


@_jit
def place_bytes(parts, begin, packed):  # type: ignore[no-untyped-def]
    """parts [blocks, n] uint8 -> packed[:, begin : begin + n]"""
    for block in range(parts.shape[0]):
        for i in range(parts.shape[1]):
            packed[block, begin + i] = parts[block, i]
