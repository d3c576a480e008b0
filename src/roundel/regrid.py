"""The same numbers on another grid: whether one can hold them, and the codes, scales and zero points that takes.

Nothing is rounded here. What follows from the grids alone is `obstacle`; what depends on the numbers is found by
`regrid`, which returns a reason in place of a matrix. The ways from one grid to another, which may be taken together:

    signed codes <-> unsigned ones    a symmetric grid is one whose zero points are all 2^(bits-1)
    few bits -> more bits             codes and zero points stay as they are
    whole-numbered tables -> codes    of ggml's iq4nl and ternary as they are; e2m1 counts halves, e0m3 quarters
    large blocks -> small ones        each small block repeats the scale of the large one that it lies in
    one dtype of scales -> another    where every scale is a number of both; scales that are quantized themselves
                                      become floats, and floats become e4m3 under a factor of 1 for the matrix
    offsets, zero points of floats <-> zero points   where they are whole multiples of the scale
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from roundel.scheme import Element, Grid, describe_block
from roundel.tensor import QuantizedTensor, plain, spread, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["is_certain", "obstacle", "regrid"]

_DTYPES = {"E8M0": "F8_E8M0"}  # a grid's scale -> its dtype, where the names differ
_WIDER = {"F16": ("F32",), "BF16": ("F32",), "E8M0": ("BF16", "F32")}  # scales -> dtypes that hold all of them


def obstacle(stored: Grid, asked: Grid, shape: tuple[int, int]) -> str | None:
    """Why no matrix [out, in] on the one grid can lie on the other; None where some can."""
    if stored.equals(asked):
        return None
    if stored.flat or asked.flat:
        return "its blocks run over the ends of rows"
    if not _holds_codes(stored, asked):
        return f"{asked.element.name} has no code for every {stored.element.name}"
    sides = zip(stored.block_of(shape), asked.block_of(shape), shape, strict=True)
    if any(old % new and old < length for old, new, length in sides):
        return f"a {describe_block(stored.block)} is not cut into whole blocks of it ({describe_block(asked.block)})"
    alike = stored.scale == asked.scale and stored.block_of(shape) == asked.block_of(shape)
    if isinstance(asked.scale, Grid) and not alike and not _is_factored(asked.scale):
        return "its scales would be rounded themselves"
    if asked.scale == "E8M0" and stored.scale != "E8M0":
        return "its scales are powers of two"
    if isinstance(asked.offset, Grid) and asked.offset != stored.offset:
        return "its offsets would be rounded themselves"
    if asked.zero == "float" and stored.zero != "float":
        return "its zero points are floats"
    if stored.offset is not None and asked.offset is None and asked.symmetric:
        return "it has no offsets and no zero points"
    return None


def is_certain(stored: Grid, asked: Grid) -> bool:
    """Whether every matrix on the one grid lies on the other, given that there is no `obstacle`."""
    zero = asked.lowest_zero == 0 or asked.lowest_zero <= stored.lowest_zero or stored.symmetric
    if stored.equals(asked):
        return zero
    if stored.scale != asked.scale and asked.scale != "F32" and asked.scale not in _WIDER.get(str(stored.scale), ()):
        return False
    if asked.offset is not None:
        short = stored.zero == "code" and stored.scale in ("F16", "BF16")  # so that products are exact in float32
        return asked.offset == "F32" and (stored.symmetric or stored.offset is not None or short)
    if stored.symmetric:
        return True
    if asked.symmetric:
        return stored.zero == "code" and stored.offset is None and asked.element.bits > stored.element.bits
    return (stored.zero, stored.offset) == (asked.zero, asked.offset) and zero


def regrid(stored: QuantizedTensor, grid: Grid) -> QuantizedTensor | str:
    """The matrix with the same numbers on another grid, or why that has no such matrix."""
    reason = obstacle(stored.grid, grid, stored.shape)
    if reason is not None:
        return reason
    found = replace(stored, grid=grid) if stored.grid.equals(grid) else _moved(stored, grid)
    if isinstance(found, str) or found.zero is None or int(found.zero.min()) >= grid.lowest_zero:
        return found
    row, group = (int(i) for i in (found.zero < grid.lowest_zero).nonzero()[0])
    lowest = int(found.zero[row, group])
    return f"the zero point of row {row}, group {group} is {lowest}, and readers of it need at least {grid.lowest_zero}"


def _moved(stored: QuantizedTensor, grid: Grid) -> QuantizedTensor | str:
    if stored.group_index is not None and stored.grid.block_of(stored.shape) != grid.block_of(stored.shape):
        return "groups of columns that do not lie side by side cannot be cut"
    scale = _scale(stored, grid)
    if isinstance(scale, str):
        return scale
    parts = _integers(stored, grid, scale) if grid.element.is_integer else (stored.codes, None, None)
    if isinstance(parts, str):
        return parts
    codes, zero, offset = parts
    return QuantizedTensor(
        grid=grid, codes=codes, scale=scale, zero=zero, offset=offset, group_index=stored.group_index,
        input_scale=stored.input_scale,
    )  # fmt: skip


def _integers(
    stored: QuantizedTensor, grid: Grid, scale: Tensor | QuantizedTensor
) -> tuple[Tensor, Tensor | None, Tensor | None] | str:
    """(codes, zero, offset) on a grid of integers, under scales that are its own already."""
    import torch

    if stored.offset is not None and grid.offset is not None:
        offset = _cast(_refined(plain(stored.offset).double(), stored, grid), str(grid.offset), "an offset")
        return offset if isinstance(offset, str) else (stored.codes, None, offset)
    zero, middle = _zero(stored), 1 << (grid.element.bits - 1)
    if isinstance(zero, str):
        return zero
    if grid.symmetric:
        levels = _whole_codes(stored)
        levels = levels if zero is None else levels - spread(zero, stored)
        low, high = (int(v) for v in levels.aminmax())
        if low < grid.element.lo or high > grid.element.hi:
            return (
                f"codes less their zero points reach {low} to {high}, {grid.element.name} ends at "
                f"{int(grid.element.lo)} and {int(grid.element.hi)}"
            )
        return levels.to(torch.int8), None, None
    if zero is None:
        codes = (_whole_codes(stored) + middle).to(torch.uint8)
        zeros = torch.full(grid.blocks(stored.shape), middle, dtype=torch.uint8)
    else:
        codes, zeros = stored.codes, _refined(zero, stored, grid).to(torch.uint8)
    if grid.offset is None:
        return codes, zeros, None
    offset = _cast(0.0 - zeros.double() * plain(scale).double(), str(grid.offset), "a zero point times its scale")
    return offset if isinstance(offset, str) else (codes, None, offset)


def _scale(stored: QuantizedTensor, grid: Grid) -> Tensor | QuantizedTensor | str:
    """Scales as the grid stores them; where codes become whole numbers, times what one of these stands for."""
    import torch

    alike = stored.grid.scale == grid.scale and stored.scale.shape == grid.blocks(stored.shape)
    if isinstance(grid.scale, Grid) and alike:
        return stored.scale
    unit = _unit(stored.grid.element) if grid.element.is_integer else None
    scale = _refined(plain(stored.scale).double() * (unit or 1.0), stored, grid)
    if not isinstance(grid.scale, Grid):
        return _cast(scale, grid.scale, "a scale")
    codes = _cast(scale, "F8_E4M3", "a scale")
    if isinstance(codes, str):
        return codes
    return QuantizedTensor(grid=grid.scale, codes=codes, scale=torch.ones((1, 1)))


def _zero(stored: QuantizedTensor) -> Tensor | str | None:
    """Whole zero points for each block as they are stored, int16; None where there are none."""
    import torch

    if stored.offset is not None:
        offset, scale = plain(stored.offset).double(), plain(stored.scale).double()
        zero = torch.where(scale == 0, 0.0, -offset / scale)
        right = (zero == zero.round()) & (-zero * scale == offset)
    elif stored.zero is None:
        return None
    else:
        zero = stored.zero.double()
        right = zero == zero.round()
    right &= (zero >= 0) & (zero < 1 << stored.grid.element.bits)
    if bool(right.all()):
        return zero.to(torch.int16)
    row, group = (int(i) for i in (~right).nonzero()[0])
    highest, found = (1 << stored.grid.element.bits) - 1, float(zero[row, group])
    return f"in row {row}, group {group} the code {found:.9g} means 0, which is no whole number from 0 to {highest}"


def _cast(values: Tensor, kind: str, what: str) -> Tensor | str:
    """Float64 values in the dtype of scales called `kind`, or which of them it does not hold."""
    found = values.float().to(torch_dtype(_DTYPES.get(kind, kind)))
    wrong = found.double() != values
    if not bool(wrong.any()):
        return found
    return f"{what} is {float(values[wrong][0]):.9g}, which {kind} does not hold"


def _refined(values: Tensor, stored: QuantizedTensor, grid: Grid) -> Tensor:
    """One value for each block as they are stored -> one for each of the grid's, which lie within these."""
    import torch

    old, new = stored.grid.block_of(stored.shape), grid.block_of(stored.shape)
    if old == new:
        return values
    down, across = (torch.arange(n) * new[axis] // old[axis] for axis, n in enumerate(grid.blocks(stored.shape)))
    return values[down][:, across]


def _whole_codes(stored: QuantizedTensor) -> Tensor:
    """What codes mean, counted in the element's unit: int16 [out, in]."""
    import torch

    element, unit = stored.grid.element, _unit(stored.grid.element)
    assert unit is not None
    if element.values is None:
        return stored.codes.to(torch.int16)
    return torch.tensor([round(v / unit) for v in element.values], dtype=torch.int16)[stored.codes.long()]


def _holds_codes(stored: Grid, asked: Grid) -> bool:
    if not asked.element.is_integer:
        return stored.element == asked.element
    unit = _unit(stored.element)
    if unit is None:
        return False
    if not stored.symmetric:
        return asked.element.bits >= stored.element.bits
    highest = (1 << (asked.element.bits - 1)) - 1
    return -highest - 1 <= stored.element.lo / unit and stored.element.hi / unit <= highest


def _unit(element: Element) -> float | None:
    """Of what all values of an element are whole multiples, few enough for 8 bits; None where there is no such."""
    if element.values is None:
        return 1.0 if element.is_integer else None
    units = (unit for unit in (1.0, 0.5, 0.25) if all((value / unit).is_integer() for value in element.values))
    return next(units, None)


def _is_factored(scale: Grid) -> bool:
    """NVFP4's scales: e4m3 under a float for the whole matrix."""
    return scale.element.name == "e4m3" and scale.block == (0, 0)
