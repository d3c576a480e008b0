"""Codes -> float weights. `QuantizedTensor.decode` is the definition; the kernel gives the same bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from roundel.ops import use_kernels
from roundel.tensor import QuantizedTensor

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["decode"]


def decode(quantized: QuantizedTensor, out: Tensor | None = None) -> Tensor:
    """The float32 weights [out, in]: (codes - zero) * scale + offset; in `out`, if that is given."""
    plain = quantized.group_index is None and not quantized.grid.flat
    if use_kernels() and quantized.codes.device.type == "cpu" and plain:
        from roundel.ops.numba.decoding import decode_by_kernel

        return decode_by_kernel(quantized, out)
    return quantized.decode() if out is None else out.copy_(quantized.decode())
