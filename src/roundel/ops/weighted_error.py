"""The squared error of a rounded matrix, each weight's with its importance, in float64: what searches compare by."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from roundel.ops.decode import decode
from roundel.ops.fit import grouped
from roundel.tensor import QuantizedTensor

__all__ = ["CHUNK", "block_errors", "counts_of", "squared_error"]

CHUNK = 1 << 18  # weights looked at at a time: what is held beside the result is some twenty of these


def squared_error(weight: Tensor, quantized: QuantizedTensor, importance: Tensor | None = None) -> float:
    """sum of importance * (weight - decoded)^2 in float64, a slab of rows at a time."""
    return float(sum(each.sum() for each in block_errors(weight, quantized, importance)))


def block_errors(weight: Tensor, quantized: QuantizedTensor, importance: Tensor | None) -> Iterator[Tensor]:
    """Errors of blocks [rows, groups] in float64, a slab of rows at a time."""
    columns = quantized.grid.block_of(quantized.shape)[1]
    decoded, counted = decode(quantized), counts_of(weight, importance, columns).double()
    rows = max(1, CHUNK // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        error = weight[start : start + rows].double() - decoded[start : start + rows].double()
        yield (grouped(error.square_(), columns) * counted).sum(-1)


def counts_of(weight: Tensor, importance: Tensor | None, columns: int) -> Tensor:
    """[in] or None -> [groups, columns] float32, ones where a group has no importance at all; 0 past a last group."""
    width = weight.shape[1]
    given = (
        torch.ones(width, dtype=torch.float32, device=weight.device)
        if importance is None
        else importance.to(weight.device).float()
    )
    ones = grouped(torch.ones(1, width, dtype=torch.float32, device=weight.device), columns)[0]
    counted = grouped(given[None], columns)[0]
    return torch.where(counted.sum(-1, keepdim=True) > 0, counted, ones)
