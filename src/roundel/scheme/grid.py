"""What a matrix is rounded to: Grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from roundel.scheme.element import Element

__all__ = ["LARGEST_BLOCK", "Grid", "describe_block"]

LARGEST_BLOCK = 1 << 31  # along an axis; a file that says more is damaged


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The grid a matrix [out, in] is rounded to: weight = (code - zero) * scale, one scale for each block.

    element     what a code means
    block       (rows, columns) sharing one scale; 0 means the whole axis: (1, 128) group, (1, 0) channel,
                (0, 0) tensor, (128, 128) block. A last block may be cut short by the matrix.
    symmetric   True: no zero point, a code times the scale is the weight; False: unsigned codes and a zero point, or
                an offset, per block
    scale       dtype of the stored scale ("F16", "BF16", "F32", "E8M0"), or a Grid where scales are quantized too
    offset      the same of what is added after scaling; None where nothing is
    exponent    how a power-of-two scale is found: "floor" of log2(max) (OCP MX specification 1.0, section 6.3) or
                "rceil", the ceiling of log2(max / largest element)
    lowest_zero the smallest zero point a format can store: 1 where readers cannot represent 0 (GPTQ v1)
    rule        whose plain rounding it is: "range" fits scales to each block's range, "ggml" is that of ggml's types
    flat        blocks run on from row to row, without regard to where rows end (bitsandbytes)
    zero        what means 0.0 in an asymmetric block without an offset: a "code", or a "float" in its place (HQQ)
    """

    element: Element
    block: tuple[int, int]
    symmetric: bool = True
    scale: str | Grid = "F16"
    offset: str | Grid | None = None
    exponent: Literal["floor", "rceil"] = "floor"
    lowest_zero: int = 0
    rule: Literal["range", "ggml"] = "range"
    zero: Literal["code", "float"] = "code"
    flat: bool = False

    @property
    def is_integer(self) -> bool:
        """Whether it is integers under one float scale a block, with a whole zero point or without."""
        floats = self.scale in ("F16", "BF16", "F32")
        return self.element.is_integer and floats and self.offset is None and self.zero == "code"

    @property
    def is_plain_integer(self) -> bool:
        """Whether it is integers as they are rounded to: under one float16 scale a block."""
        return self.is_integer and self.scale == "F16"

    @property
    def has_float_zeros(self) -> bool:
        """Whether it is integers under one float16 scale a block, whose zero point is a float16 too (HQQ)."""
        return self.element.is_integer and self.zero == "float" and self.scale == "F16" and self.rule == "range"

    @property
    def is_integer_in_groups(self) -> bool:
        """Whether it is integers in groups of a row's columns, under one float scale each, with a zero point that is a
        code, or without."""
        return self.is_integer and self.block[0] == 1 and not self.flat

    @property
    def row_columns(self) -> int:
        """Of what a row's length has to be a multiple, where blocks cannot be cut short: ggml's types; else 1."""
        if self.rule != "ggml":
            return 1
        return self.block[1] * (self.scale.block[1] if isinstance(self.scale, Grid) else 1)

    @property
    def is_mx(self) -> bool:
        """Whether it is one of the MX floats, e2m1 or e4m3 under powers of two."""
        return self.scale == "E8M0" and self.element.name in ("e2m1", "e4m3") and self.rule == "range"

    def equals(self, other: Grid) -> bool:
        """Whether codes on the one are codes on the other, limits on zero points and rules of rounding left aside."""
        aside = {"lowest_zero": 0, "rule": "range", "exponent": "floor"}
        return replace(self, **aside) == replace(other, **aside)  # type: ignore[arg-type]

    def blocks(self, shape: tuple[int, int]) -> tuple[int, int]:
        """How many blocks a matrix of this shape has along [out, in]."""
        if self.flat:
            return 1, -(-shape[0] * shape[1] // self.block[1])
        rows, columns = self.block_of(shape)
        return -(-shape[0] // rows), -(-shape[1] // columns)

    def block_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The block with 0 replaced by the axis' length."""
        return self.block[0] or max(shape[0], 1), self.block[1] or max(shape[1], 1)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Stored bits per weight, scales and zero points included."""
        blocks = self.blocks(shape)
        count = blocks[0] * blocks[1]
        extra = 0.0
        if self.offset is not None:
            extra = _stored_bits(self.offset, blocks)
        elif not self.symmetric:
            extra = count * self.element.bits if self.zero == "code" else _stored_bits(self.scale, blocks)
        return self.element.bits + (_stored_bits(self.scale, blocks) + extra) / max(1, shape[0] * shape[1])


def _stored_bits(kind: str | Grid, blocks: tuple[int, int]) -> float:
    """What one value for each block takes, in all."""
    count = blocks[0] * blocks[1]
    if isinstance(kind, Grid):
        return kind.bits_per_weight(blocks) * count
    return float(count * {"E8M0": 8, "F8_E4M3": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64}[kind])


def describe_block(block: tuple[int, int]) -> str:
    """`group of 128`, `channel`, `tensor`, `128x128 block`: a block as people say it."""
    if block == (0, 0):
        return "tensor"
    if block == (1, 0):
        return "channel"
    return f"group of {block[1]}" if block[0] == 1 else f"{block[0]}x{block[1]} block"
