"""`ops.losses` compiled: sums go in the order of the processor's lanes, row by row."""

from __future__ import annotations

import numba
import numpy as np
from torch import Tensor

from roundel.ops.numba.stored import BF16, F32, add_square, value_of
from roundel.ops.numba.tensors import stored_bits

__all__ = ["first_not_finite_kernel", "squares_kernel"]

_jit = numba.njit(cache=True, nogil=True, error_model="numpy", boundscheck=False)


def first_not_finite_kernel(weight: Tensor) -> int:
    """Flat index of the first weight that is not finite, -1 where all are."""
    if weight.numel() == 0:
        return -1
    bits = stored_bits(weight)
    if bits.dtype == F32:
        return int(_first_of_32(bits))
    return int(_first_of_16(bits.view(np.uint16), np.uint16(0x7F80 if bits.dtype == BF16 else 0x7C00)))


def squares_kernel(weight: Tensor, decoded: Tensor) -> tuple[float, float]:
    """See `ops.losses.squares`."""
    signal, noise = _squares(stored_bits(weight), decoded.detach().contiguous().numpy())
    return float(signal), float(noise)


@_jit
def _first_of_16(bits, exponent):  # type: ignore[no-untyped-def]
    for row in range(bits.shape[0]):
        top = np.uint16(0)
        for column in range(bits.shape[1]):
            here = np.uint16(bits[row, np.uint64(column)] & exponent)
            top = here if here > top else top
        if top == exponent:
            for column in range(bits.shape[1]):
                if np.uint16(bits[row, column] & exponent) == exponent:
                    return row * bits.shape[1] + column
    return -1


@_jit
def _first_of_32(bits):  # type: ignore[no-untyped-def]
    exponent = np.uint32(0x7F800000)
    for row in range(bits.shape[0]):
        top = np.uint32(0)
        for column in range(bits.shape[1]):
            here = np.uint32(bits[row, np.uint64(column)] & exponent)
            top = here if here > top else top
        if top == exponent:
            for column in range(bits.shape[1]):
                if np.uint32(bits[row, column] & exponent) == exponent:
                    return row * bits.shape[1] + column
    return -1


@_jit
def _squares(stored, decoded):  # type: ignore[no-untyped-def]
    signal, noise = np.float64(0.0), np.float64(0.0)
    for row in range(stored.shape[0]):
        length, lost = np.float64(0.0), np.float64(0.0)
        for column in range(stored.shape[1]):
            value = np.float64(value_of(stored[row, column]))
            length = add_square(length, value)
            lost = add_square(lost, value - np.float64(decoded[row, column]))
        signal += length
        noise += lost
    return signal, noise
