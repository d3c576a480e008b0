"""What became of a matrix, in one pass over it: the first weight that is not finite, and the sums of squares of weights
and of their errors. Definitions in plain torch; kernels in `ops/numba/losses.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from roundel.ops import use_kernels

__all__ = ["first_not_finite", "squares"]

COMPARED = 1 << 20  # weights compared at a time


def first_not_finite(weight: Tensor) -> tuple[int, int] | None:
    """Row and column of the first NaN or infinity of a matrix [out, in]; None where all are finite."""
    if use_kernels() and weight.device.type == "cpu" and weight.dtype != torch.float64:
        from roundel.ops.numba.losses import first_not_finite_kernel

        at = first_not_finite_kernel(weight)
        return None if at < 0 else divmod(at, weight.shape[1])
    is_finite = torch.isfinite(weight)
    if bool(is_finite.all()):
        return None
    row, column = (int(i) for i in (~is_finite).nonzero()[0])
    return row, column


def squares(weight: Tensor, decoded: Tensor) -> tuple[float, float]:
    """sum weight^2 and sum (weight - decoded)^2, added up in float64; kernels may add in another order.

    weight    [out, in], any float dtype
    decoded   [out, in], any float dtype
    """
    fits = weight.dtype != torch.float64 and decoded.dtype == torch.float32
    if use_kernels() and fits and weight.device.type == decoded.device.type == "cpu":
        from roundel.ops.numba.losses import squares_kernel

        return squares_kernel(weight, decoded)
    signal, noise = 0.0, 0.0
    rows = max(1, COMPARED // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):  # a slab at a time
        exact = weight[start : start + rows].double()
        signal += float(exact.square().sum())
        noise += float((exact - decoded[start : start + rows]).square_().sum())
    return signal, noise
