"""Scales under which rounded weights are as long, along the weights themselves, as these are.

A scale of least squared error makes the decoded weights too short: what is left, w - decoded, stands at right angles to
decoded, so sum w * decoded = sum decoded^2 < sum w^2. All outputs shrink alike, and errors that agree add up from
layer to layer where errors by chance do not. With the scale times

    sum i w^2 / sum i w decoded

they do not shrink, in the mean. It is the scale of EDEN (Vargaftik et al. 2022, arXiv:2108.08842, section 3), for each
block, i the importance of a weight. Where the squared error is a share e of the decoded weights' squares, it grows by e
of itself; a part of the way costs the square of that part of it, while outputs grow by the part itself.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from roundel.ops.decode import decode
from roundel.ops.fit import grouped
from roundel.tensor import QuantizedTensor, plain

__all__ = ["unbiased"]

LARGEST = 2.0  # by more, a scale was not one of least squares
SLAB = 1 << 20  # weights compared at a time


def unbiased(
    weight: Tensor, found: QuantizedTensor, importance: Tensor | None = None, share: float = 1.0
) -> QuantizedTensor:
    """The same codes and zero points under other float16 scales.

    weight       [out, in], any float dtype
    found        integers under float16 scales
    importance   [in], at least 0; None: all alike. A block with none at all keeps its scale
    share        how much of the way scales go: 0 leaves them, 1 makes the weights as long as they are
    """
    columns = found.grid.block_of(found.shape)[1]
    scale, decoded = plain(found.scale), decode(found)
    counted = (
        torch.ones(found.shape[1], dtype=torch.float32, device=weight.device)
        if importance is None
        else importance.to(weight.device)
    )
    counted = counted.double()
    rows = max(1, SLAB // max(1, found.shape[1]))
    factors = []
    for start in range(0, found.shape[0], rows):
        exact = weight[start : start + rows].double()
        weighed = exact * counted
        length, met = (
            grouped(weighed * other, columns).sum(-1) for other in (exact, decoded[start : start + rows].double())
        )
        factors.append(torch.where((length > 0) & (met > 0), length / met, 1.0).clamp(max=LARGEST))
    widened = (scale.double() * (1 + share * (torch.cat(factors) - 1))).to(torch.float16)
    return replace(found, scale=torch.where(torch.isfinite(widened), widened, scale.to(torch.float16)))
