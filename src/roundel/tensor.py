"""What the numbers of a quantized weight mean: TensorSpec (a tensor's name, dtype and shape) and QuantizedTensor.

dtypes are spelled as safetensors spells them ("BF16", "I32", "F8_E4M3"), so that a plan needs no torch; `torch_dtype`
gives torch's. Importing this file does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from roundel.errors import GridError
from roundel.scheme import Grid

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "FLOAT_DTYPES",
    "ITEMSIZE",
    "QuantizedTensor",
    "TensorSpec",
    "below_each_other",
    "code_values",
    "plain",
    "spread",
    "torch_dtype",
]

ITEMSIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
FLOAT_DTYPES = frozenset({"BF16", "F16", "F32", "F64"})
_TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip

DECODED = 1 << 20  # weights decoded at a time


@dataclass(frozen=True)
class TensorSpec:
    """A tensor before it exists: its name in the file, its safetensors dtype, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of a safetensors dtype name."""
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[name])
    return dtype


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A weight matrix on a grid:  weight ≈ (codes - zero) * scale + offset.

    codes   [out, in]      values of the grid's element, one per weight, never packed: int8 for signed and uint8 for
                           unsigned integers, uint8 table indices for e0m3, e2m1 and nf4, float8_e4m3fn for e4m3
    scale   [out/r, in/c]  one per block of r x c weights (rounded up); itself a QuantizedTensor where scales are
                           quantized too (NVFP4, double quantization)
    zero    like scale     the code that means 0.0; None when the grid is symmetric
    offset  like scale     added after scaling (MLX bias, GGUF min), itself a QuantizedTensor where the grid says so;
                           never with `zero`
    group_index [in]       int32, the block of each column, where columns of a block do not lie side by side (GPTQ's
                           act-order); None where they do
    input_scale [1]        float32, by which codes of the layer's inputs are multiplied, where that is stored
                           (FP8_STATIC; of NVFP4 the factor for the whole tensor); None where inputs are scaled at run
                           time

    Raises GridError when shapes, ranges or symmetry disagree with `grid`.
    """

    grid: Grid
    codes: Tensor
    scale: Tensor | QuantizedTensor
    zero: Tensor | None = None
    offset: Tensor | QuantizedTensor | None = None
    group_index: Tensor | None = None
    input_scale: Tensor | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]"""
        return self.codes.shape[0], self.codes.shape[1]

    def decode(self) -> Tensor:
        """The float32 weights, [out, in]; a slab of rows at a time, so that little more than these is held."""
        import torch

        out, width = self.shape
        weights = torch.empty(self.shape, dtype=torch.float32, device=self.codes.device)
        scale, rows = plain(self.scale), max(1, DECODED // max(1, width))
        offset = None if self.offset is None else plain(self.offset)
        for start in range(0, out, rows):
            part = slice(start, min(start + rows, out))
            values = code_values(self.codes[part], self.grid)
            if self.zero is not None:
                values = values - spread(self.zero.float(), self, part)
            values = values * spread(scale, self, part)
            weights[part] = values if offset is None else values + spread(offset, self, part)
        return weights

    @property
    def has_rows(self) -> bool:
        """Whether blocks are one row high, those of scales too unless they are the whole matrix."""
        grids = [self.grid, *(g for g in (self.grid.scale, self.grid.offset) if isinstance(g, Grid))]
        return self.grid.block[0] == 1 and not any(grid.flat or grid.block[0] > 1 for grid in grids)

    def rows(self, part: slice | Tensor) -> QuantizedTensor:
        """Some rows of a matrix that has_rows."""

        def of(value: Any) -> Any:
            if not isinstance(value, QuantizedTensor):
                return None if value is None else value[part]
            whole = value.grid.block[0] == 0  # one scale for all of them
            own, base = value.scale if whole else of(value.scale), value.offset if whole else of(value.offset)
            zero = value.zero if whole else of(value.zero)
            return replace(value, codes=value.codes[part], scale=own, offset=base, zero=zero)

        parts = {name: of(getattr(self, name)) for name in ("codes", "scale", "zero", "offset")}
        return replace(self, **parts)

    def to(self, device: str) -> QuantizedTensor:
        """The same numbers on a device."""
        if self.codes.device.type == device == "cpu":
            return self
        parts = ("codes", "scale", "zero", "offset", "group_index", "input_scale")
        values: dict[str, Any] = {name: getattr(self, name) for name in parts}
        return replace(self, **{name: value.to(device) for name, value in values.items() if value is not None})


def below_each_other(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Matrices on one grid, whose blocks and those of their scales are one row high, as one. The inverse of `rows`."""
    import torch

    def of(values: list[Any]) -> Any:
        if values[0] is None:
            return None
        return below_each_other(values) if isinstance(values[0], QuantizedTensor) else torch.cat(values)

    names = ("codes", "scale", "zero", "offset")
    return replace(parts[0], **{name: of([getattr(part, name) for part in parts]) for name in names})


def code_values(codes: Tensor, grid: Grid) -> Tensor:
    """What each code means before scaling, float32, same shape."""
    if grid.element.values is None:
        return codes.float()
    import torch

    return torch.tensor(grid.element.values, dtype=torch.float32, device=codes.device)[codes.long()]


def plain(scale: Tensor | QuantizedTensor) -> Tensor:
    """Scales or offsets as float32, whether they are stored as floats or quantized themselves."""
    return scale.decode() if isinstance(scale, QuantizedTensor) else scale.float()


def spread(per_block: Tensor, like: QuantizedTensor, part: slice = slice(None)) -> Tensor:
    """One value per block [out/r, in/c] -> one value per weight, of all rows or of a part of them. A last block may be
    cut short."""
    rows, columns = like.grid.block_of(like.shape)
    out, width = like.shape
    if like.grid.flat:
        columns = min(columns, out * width)
        start, stop, _ = part.indices(out)
        first = start * width // columns
        whole = per_block[0, first : -(-stop * width // columns)].repeat_interleave(columns)
        return whole[start * width - first * columns :][: (stop - start) * width].view(-1, width)
    rows, columns = min(rows, out), min(columns, width)  # a block may be larger than the matrix
    if rows == 1:
        per_block = per_block[part]
    else:
        per_block = per_block.repeat_interleave(rows, dim=0)[: like.shape[0]][part]
    if like.group_index is not None:
        return per_block[:, like.group_index.long()]
    return per_block.repeat_interleave(columns, dim=1)[:, : like.shape[1]]


def _check(q: QuantizedTensor) -> None:
    if q.codes.ndim != 2:
        raise GridError(f"codes have {q.codes.ndim} axes, a matrix has 2")
    blocks = q.grid.blocks(q.shape)
    for name, value in (("scale", q.scale), ("zero", q.zero), ("offset", q.offset)):
        if value is not None and tuple(value.shape) != blocks:
            raise GridError(f"{name} is {list(value.shape)}, a matrix {list(q.shape)} has {list(blocks)} blocks")
    if (q.zero is None) != q.grid.symmetric and q.offset is None:
        raise GridError(f"a {'symmetric' if q.grid.symmetric else 'asymmetric'} grid and zero={q.zero is not None}")
    if q.zero is not None and q.offset is not None:
        raise GridError("zero and offset exclude each other")
    if isinstance(q.scale, QuantizedTensor) != isinstance(q.grid.scale, Grid):
        raise GridError("a quantized scale goes with a grid of scales, and only with it")
    if isinstance(q.offset, QuantizedTensor) != isinstance(q.grid.offset, Grid):
        raise GridError("a quantized offset goes with a grid of offsets, and only with it")
    if q.group_index is not None:
        _check_index(q, q.group_index, blocks[1])
    element = q.grid.element
    if element.is_integer and q.codes.numel():
        low, high = (int(v) for v in q.codes.aminmax())
        if low < element.lo or high > element.hi:
            raise GridError(f"codes reach {low}..{high}, {element.name} ends at {element.lo}..{element.hi}")


def _check_index(q: QuantizedTensor, index: Tensor, blocks: int) -> None:
    if q.grid.block_of(q.shape)[0] != 1 or tuple(index.shape) != q.shape[1:]:
        raise GridError(f"a group index {list(index.shape)} names blocks of one row, a column each")
    low, high = (int(v) for v in index.aminmax()) if index.numel() else (0, 0)
    if low < 0 or high >= blocks:
        raise GridError(f"the group index reaches {low}..{high}, there are {blocks} blocks")
