"""Rounding to a table of values that spans -1 to 1: bitsandbytes' NF4 and FP4, and the 8 bits of their scales.

Dettmers et al. 2023, "QLoRA" (arXiv:2305.14314), section 3. Equal, code for code, to bitsandbytes 0.50.2 on CPU where
scales are floats: a scale is the largest magnitude of a block, weights are multiplied by its reciprocal, and what lies
in the middle of two values goes to the lower. Nested scales (double quantization) are the float scales less their mean,
on the dynamic table; codes here belong to the scale as it is stored, in bitsandbytes to the one before it was rounded.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from roundel.ops.fit import grouped
from roundel.scheme import Element, Grid
from roundel.tensor import QuantizedTensor

__all__ = ["TABLES", "fit_table", "round_table"]

TABLES = ("nf4", "fp4", "dynamic8")


def fit_table(groups: Tensor, scale: str | Grid) -> Tensor | QuantizedTensor:
    """The largest magnitude of each group [out, groups, columns] -> [out, groups], float32 or on a grid itself."""
    largest = groups.abs().amax(-1)
    if not isinstance(scale, Grid):
        return largest
    offset = largest.mean()
    blocks = grouped((largest - offset).view(1, -1), scale.block[1])
    nested = blocks.abs().amax(-1)
    codes = round_table(blocks * torch.where(nested == 0, 0.0, 1 / nested)[..., None], scale.element)
    return QuantizedTensor(
        grid=scale,
        codes=codes.flatten()[: largest.numel()].view(largest.shape),
        scale=nested,
        offset=torch.full_like(nested, float(offset)),
    )


def round_table(scaled: Tensor, element: Element) -> Tensor:
    """float32 values -> uint8 indices of the nearest values of the table, same shape."""
    values, order = _sorted(element)
    between = (values[1:] + values[:-1]) / 2
    return order.to(scaled.device)[torch.bucketize(scaled, between.to(scaled.device))]


@cache
def _sorted(element: Element) -> tuple[Tensor, Tensor]:
    """The table in rising order, float32, and where each value stands in it, uint8."""
    assert element.values is not None
    values, order = torch.tensor(element.values, dtype=torch.float32).sort(stable=True)
    return values, order.to(torch.uint8)
