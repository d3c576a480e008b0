"""Columns of a group brought side by side, for backends that multiply group by group."""

from __future__ import annotations

import torch
from torch import Tensor

from roundel.errors import BackendError
from roundel.tensor import QuantizedTensor

__all__ = ["side_by_side", "unsigned"]


def side_by_side(quantized: QuantizedTensor, backend: str) -> tuple[Tensor, Tensor | None]:
    """Codes [out, in] in the order of their groups, and that order [in] int64, by which columns of inputs are taken
    too; the codes as they are, and None, where columns of a group lie side by side.

    Raises BackendError for a group index that gives a group more or fewer columns than the grid does.
    """
    if quantized.group_index is None:
        return quantized.codes, None
    index, columns = quantized.group_index.long(), quantized.grid.block_of(quantized.shape)[1]
    counts = torch.bincount(index, minlength=quantized.scale.shape[1])
    expected = torch.full_like(counts, columns)
    expected[-1] = quantized.shape[1] - columns * (len(counts) - 1)
    if not torch.equal(counts, expected):
        raise BackendError(
            f"A group index gives groups different numbers of columns, which backend {backend} does not take. Load "
            'with backend="torch".'
        )
    order = index.argsort(stable=True)
    return quantized.codes[:, order], order


def unsigned(codes: Tensor, bits: int) -> Tensor:
    """Codes of an integer grid, int8 or uint8 -> uint8, 2^(bits-1) added to signed ones."""
    stored = codes.contiguous().view(torch.uint8)
    return stored + (1 << (bits - 1)) if codes.dtype == torch.int8 else stored  # wraps around, as two's complement does
