"""Codes of 1 to 8 bits in bytes, on any device: the layout that the reference backend keeps weights in.

A width is the sum of a few of 8, 4, 2 and 1 (3 = 2 + 1, 5 = 4 + 1, 7 = 4 + 2 + 1), each of which divides a byte. A code
is cut into these parts, its highest bits first, and each part has a *plane*: uint8 [rows, ceil(n * width / 8)], the
first column in a byte's lowest bits. Nothing crosses from byte to byte, so reading is a shift and a mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["join_planes", "split_planes"]


def split_planes(codes: Tensor, bits: int) -> list[Tensor]:
    """Unsigned codes [rows, n] uint8 -> planes, that of the highest bits first."""
    planes, below = [], bits
    for width in _widths(bits):
        below -= width
        part, each = (codes >> below) & ((1 << width) - 1), 8 // width
        part = torch.nn.functional.pad(part, (0, -part.shape[1] % each)).view(part.shape[0], -1, each)
        plane = part[:, :, 0]
        for place in range(1, each):
            plane = plane | part[:, :, place] << place * width
        planes.append(plane.contiguous())
    return planes


def join_planes(planes: Sequence[Tensor], bits: int, count: int) -> Tensor:
    """Planes -> codes [rows, count] uint8: the inverse of `split_planes`."""
    codes: Tensor | None = None
    for width, plane in zip(_widths(bits), planes, strict=True):
        if width < 8:
            shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)
            plane = ((plane[:, :, None] >> shifts) & ((1 << width) - 1)).flatten(1)[:, :count]
        codes = plane if codes is None else codes << width | plane
    assert codes is not None
    return codes


def _widths(bits: int) -> list[int]:
    return [width for width in (8, 4, 2, 1) if bits & width]
