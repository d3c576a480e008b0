"""`ops.losses` compiled: sums go in the order of the processor's lanes, row by row."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from roundel.ops.numba.compiling import jit
from roundel.ops.numba.stored import BF16, F16, F32, add_square, value_of
from roundel.ops.numba.tensors import stored_bits

__all__ = ["first_not_finite_kernel", "squares_kernel"]

EXPONENTS = {BF16: np.uint16(0x7F80), F16: np.uint16(0x7C00), F32: np.uint32(0x7F800000)}  # all ones: not finite


def first_not_finite_kernel(weight: Tensor) -> int:
    """Flat index of the first weight that is not finite, -1 where all are."""
    if weight.numel() == 0:
        return -1
    bits = stored_bits(weight)
    exponent = EXPONENTS[bits.dtype.type]
    return int(_first(bits.view(exponent.dtype), exponent))


def squares_kernel(weight: Tensor, decoded: Tensor) -> tuple[float, float]:
    """See `ops.losses.squares`."""
    signal, noise = _squares(stored_bits(weight), decoded.detach().contiguous().numpy())
    return float(signal), float(noise)


@jit
def _first(bits, exponent):  # type: ignore[no-untyped-def]
    kind = bits.dtype.type
    for row in range(bits.shape[0]):
        top = kind(0)
        for column in range(bits.shape[1]):
            here = kind(bits[row, np.uint64(column)] & exponent)
            top = here if here > top else top
        if top == exponent:
            for column in range(bits.shape[1]):
                if kind(bits[row, column] & exponent) == exponent:
                    return row * bits.shape[1] + column
    return -1


@jit
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
