"""Laying stored numbers into the bytes of blocks, in numba: `formats.gguf.block_types` with the same bytes.

Sixteen bytes are made at a time, as one vector, where a field has them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from roundel.ops.numba.compiling import jit

__all__ = ["place_bytes", "place_plane", "place_six_bits"]

WIDE = 16
_BYTES = ir.VectorType(ir.IntType(8), WIDE)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, at: Any, kind: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), kind.as_pointer())


def _merge(bits: int):  # type: ignore[no-untyped-def]
    """Sixteen bytes, each of 8 / bits numbers that lie `stride` apart."""
    low = ir.Constant(_BYTES, [(1 << bits) - 1] * WIDE)

    @intrinsic
    def work(typing_context, numbers, at, stride, first, packed, into):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            numbers, at, stride, first, packed, into = arguments
            lone = builder.insert_element(
                ir.Constant(_BYTES, ir.Undefined), builder.trunc(first, ir.IntType(8)), ir.Constant(ir.IntType(32), 0)
            )
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), WIDE), [0] * WIDE)
            shift = builder.shuffle_vector(lone, ir.Constant(_BYTES, ir.Undefined), zeros)
            found = ir.Constant(_BYTES, [0] * WIDE)
            for k in range(8 // bits):
                offset = builder.add(at, builder.mul(stride, ir.Constant(stride.type, k)))
                source = _pointer(context, builder, signature.args[0], numbers, offset, _BYTES)
                part = builder.and_(builder.lshr(builder.load(source, align=1), shift), low)
                found = builder.or_(found, builder.shl(part, ir.Constant(_BYTES, [k * bits] * WIDE)))
            target = _pointer(context, builder, signature.args[4], packed, into, _BYTES)
            builder.store(found, target, align=1)
            return context.get_dummy_value()

        whole = types.intp
        return types.void(numbers, whole, whole, whole, packed, whole), generate

    return work


_nibbles, _pairs, _singles, _copies = _merge(4), _merge(2), _merge(1), _merge(8)


@intrinsic
def _bit_row(typing_context, numbers, at, first, packed, into):  # type: ignore[no-untyped-def]
    """One bit of each of 32 numbers -> four bytes, lowest first."""
    vector = ir.VectorType(ir.IntType(8), 32)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        numbers, at, first, packed, into = arguments
        source = _pointer(context, builder, signature.args[0], numbers, at, vector)
        one = builder.shl(ir.Constant(ir.IntType(8), 1), builder.trunc(first, ir.IntType(8)))
        lone = builder.insert_element(ir.Constant(vector, ir.Undefined), one, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), 32), [0] * 32)
        bit = builder.shuffle_vector(lone, ir.Constant(vector, ir.Undefined), zeros)
        held = builder.and_(builder.load(source, align=1), bit)
        row = builder.bitcast(builder.icmp_unsigned("!=", held, ir.Constant(vector, [0] * 32)), ir.IntType(32))
        target = _pointer(context, builder, signature.args[3], packed, into, ir.IntType(32))
        builder.store(row, target, align=1)
        return context.get_dummy_value()

    return types.void(numbers, types.intp, types.intp, packed, types.intp), generate


@jit
def place_plane(numbers, bits, span, first, begin, packed):  # type: ignore[no-untyped-def]
    """numbers [blocks, n] uint8 -> packed[:, begin : begin + n * bits / 8]; see `formats.gguf.block_types.Plane`.

    Both arrays are C-contiguous.
    """
    count, n, nbytes = span * bits // 8, numbers.shape[1], packed.shape[1]
    if bits == 1 and span == 8:
        for block in range(numbers.shape[0]):
            for k in range(n // 32):
                _bit_row(numbers, block * n + 32 * k, first, packed, block * nbytes + begin + 4 * k)
        return
    for block in range(numbers.shape[0]):
        for chunk in range(n // span):
            source, target = block * n + chunk * span, block * nbytes + begin + chunk * count
            if count >= WIDE:
                for i in range(0, count, WIDE):
                    if bits == 4:
                        _nibbles(numbers, source + i, count, first, packed, target + i)
                    elif bits == 2:
                        _pairs(numbers, source + i, count, first, packed, target + i)
                    elif bits == 1:
                        _singles(numbers, source + i, count, first, packed, target + i)
                    else:
                        _copies(numbers, source + i, count, first, packed, target + i)
                continue
            low = np.uint8((1 << bits) - 1)
            for i in range(count):
                found = np.uint8(0)
                for k in range(8 // bits):
                    part = (numbers[block, chunk * span + i + k * count] >> np.uint8(first)) & low
                    found |= np.uint8(part << np.uint8(k * bits))
                packed[block, begin + chunk * count + i] = found


@jit
def place_six_bits(levels, low_levels, begin, packed):  # type: ignore[no-untyped-def]
    """levels, low_levels [blocks, 8] uint8 -> packed[:, begin : begin + 12]"""
    for block in range(levels.shape[0]):
        for j in range(4):
            a, b = levels[block, j + 4], low_levels[block, j + 4]
            packed[block, begin + j] = levels[block, j] | np.uint8((a >> np.uint8(4)) << np.uint8(6))
            packed[block, begin + 4 + j] = low_levels[block, j] | np.uint8((b >> np.uint8(4)) << np.uint8(6))
            packed[block, begin + 8 + j] = np.uint8(a & np.uint8(15)) | np.uint8((b & np.uint8(15)) << np.uint8(4))


@jit
def place_bytes(parts, begin, packed):  # type: ignore[no-untyped-def]
    """parts [blocks, n] uint8 -> packed[:, begin : begin + n]"""
    for block in range(parts.shape[0]):
        for i in range(parts.shape[1]):
            packed[block, begin + i] = parts[block, i]
