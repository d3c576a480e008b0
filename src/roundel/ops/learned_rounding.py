"""Rounding that can be learned: a shift for every weight, a factor for every block's range. Definitions, in float32.

Source: SignRound (Cheng et al., 2023, arXiv 2309.05516), equations 3 to 5: with a shift V and range factors,

    steps  = weight / scale + V
    weight ≈ nearest(steps) * scale

where nearest is clamped to the codes of the grid, and scale (and zero) follow from the block's range times its
factors. Instead of the range of the weights, the range of any start on the grid can be the one that is multiplied.

Steps and codes are counted from the zero point here: they are the values by which the scale is multiplied. For the MX
floats they are values of the element, and the scale is a power of two. ggml's block types with a minimum decode to
nearest * scale + base,  and the lower factor is the base's. Where scales and bases are whole-number levels of what a
super-block shares, that stays as the start has it, and the levels follow their factors.

How shifts and factors are learned is `learned_descent`. `ops/numba/learned_rounding.py` holds the faster spelling of
`round_matrix`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from roundel.ops import use_kernels
from roundel.ops.fit import SMALLEST_SCALE, fit_power_of_two, grouped
from roundel.ops.minifloat import decode_e8m0, round_e2m1, round_e4m3
from roundel.scheme import Grid
from roundel.tensor import QuantizedTensor, code_values, plain

__all__ = [
    "LARGEST_FACTOR",
    "Learned",
    "Range",
    "at",
    "begin",
    "finish",
    "fit_range",
    "flat",
    "round_matrix",
    "round_matrix_reference",
]

LARGEST_SCALE = 65504.0  # of float16
LARGEST_NARROW = 65280.0  # the largest bfloat16 below it
LEAST_HALF = 2.0**-24
SLAB = 1 << 21  # weights whose codes are computed at a time
LARGEST_FACTOR = 2.0


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A matrix whose rounding is being learned; shift and factors are changed in place.

    weight   [out, in] float32, or the 16 bits it is stored in
    grid     integers, e2m1 or e4m3, in blocks of (1, n) or (1, 0)
    shift    [out, in], in steps of the scale; 0 at the start
    low      [out, blocks] factor of the lower end of the range; None on symmetric grids, whose range has one end
    high     [out, blocks] factor of the range, or of its upper end; 1 at the start, kept within 0 and LARGEST_FACTOR
    lower, upper   [out, blocks] the range at the start. Symmetric integers: upper is the signed scale itself, and
             lower is not used. MX: upper is the largest magnitude. ggml's types: the scale, and the base
    narrow   whether scales of integers are numbers that bfloat16 has too, so that readers who keep them in it lose
             nothing
    still    [out, blocks] which hold nothing but zeros, and are not moved; None: none does
    unit, low_unit   [out, blocks] of what scale and base are whole multiples; None where they are float16
    """

    weight: Tensor
    grid: Grid
    shift: Tensor
    low: Tensor | None
    high: Tensor
    lower: Tensor | None
    upper: Tensor
    narrow: bool = False
    still: Tensor | None = None
    unit: Tensor | None = None
    low_unit: Tensor | None = None

    @property
    def columns(self) -> int:
        """Weights in a block."""
        return self.grid.block_of((self.weight.shape[0], self.weight.shape[1]))[1]


@dataclass(frozen=True, kw_only=True)
class Range:
    """What the factors come to: scale [out, blocks] float32 (a float16 or a power of two), and zero likewise, a whole
    number; 0 on symmetric grids; base likewise, what is added after scaling; None: nothing."""

    scale: Tensor
    zero: Tensor
    base: Tensor | None = None


def begin(weight: Tensor, start: QuantizedTensor, narrow: bool = False) -> Learned:
    """The matrix [out, in] with shifts of 0, on the scales of `start`: it rounds to nearest on them.

    weight   float32, bfloat16 or float16
    narrow   see Learned
    """
    grid, scale = start.grid, plain(start.scale)
    ones = torch.ones_like(scale)
    low: Tensor | None = None
    lower: Tensor | None = None
    unit, low_unit = _unit(start.scale), _unit(start.offset)
    if start.offset is not None:
        low, lower = ones.clone(), plain(start.offset)
    if grid.scale == "E8M0":
        # The weights' largest magnitude, moved to where it would give the exponent that the start has.
        blocks = grouped(weight.float(), grid.block_of(start.shape)[1])
        upper = blocks.abs().amax(-1) * (scale / decode_e8m0(fit_power_of_two(blocks, grid)))
    elif start.zero is None:
        upper = scale if unit is None else torch.where(scale == 0, unit, scale)
    else:
        zero = start.zero.float()
        low, lower, upper = ones.clone(), -zero * scale, (grid.element.hi - zero) * scale
    still = (grouped(weight, grid.block_of(start.shape)[1]) == 0).all(-1)
    return Learned(
        weight=weight,
        grid=grid,
        shift=torch.zeros_like(weight, dtype=torch.float32),
        low=low,
        high=ones,
        lower=lower,
        upper=upper,
        narrow=narrow,
        still=still if bool(still.any()) else None,
        unit=unit,
        low_unit=low_unit,
    )


def _unit(shared: Tensor | QuantizedTensor | None) -> Tensor | None:
    """What each block's level is multiplied by, [out, blocks]; the least float16 where a super-block is all zeros."""
    if not isinstance(shared, QuantizedTensor):
        return None
    assert isinstance(shared.scale, Tensor), "two levels of scales"
    unit = shared.scale.float().abs().clamp(min=LEAST_HALF) * torch.where(shared.scale < 0, -1.0, 1.0)
    return unit.repeat_interleave(shared.codes.shape[1] // unit.shape[1], 1)


def fit_range(learned: Learned) -> Range:
    """Scales and zero points of the present factors.

    Symmetric: scale = upper * high. MX: the power of two that `fit_power_of_two` gives upper * high. Asymmetric: ends
    lower * low and upper * high; scale = (end - end) / (2^bits - 1); zero = round(-lower end / scale), half to even.
    """
    grid, high = learned.grid, learned.upper * learned.high
    if grid.scale == "E8M0":
        scale = decode_e8m0(fit_power_of_two(high[..., None], grid))
        return Range(scale=scale, zero=torch.zeros_like(scale))
    if grid.rule == "ggml":
        return _fit_blocks(learned, high)
    if learned.low is None or learned.lower is None:
        return Range(scale=_stored(high, learned.narrow), zero=torch.zeros_like(high))
    low = learned.lower * learned.low
    scale = _stored((high - low) / grid.element.hi, learned.narrow)
    return Range(scale=scale, zero=torch.round(-low / scale).clamp(grid.lowest_zero, grid.element.hi))


def _fit_blocks(learned: Learned, high: Tensor) -> Range:
    """Scales as float16, or as whole multiples of the unit other than 0; bases as float16, or as such multiples."""
    grid, zero, base = learned.grid, torch.zeros_like(high), None
    scale = _stored(high, narrow=False)
    if learned.unit is not None and isinstance(grid.scale, Grid):
        element = grid.scale.element
        levels = torch.round(high / learned.unit).clamp(element.lo, element.hi)
        scale = (
            torch.where(levels == 0, torch.where(learned.upper / learned.unit < 0, -1.0, 1.0), levels) * learned.unit
        )
    if learned.low is not None and learned.lower is not None:
        low = learned.lower * learned.low
        base = low.clamp(-LARGEST_SCALE, LARGEST_SCALE).half().float()
        if learned.low_unit is not None and isinstance(grid.offset, Grid):
            element = grid.offset.element
            base = torch.round(low / learned.low_unit).clamp(element.lo, element.hi) * learned.low_unit
    return Range(scale=scale, zero=zero, base=base)


def round_matrix(learned: Learned, found: Range, out: Tensor | None = None) -> Tensor:
    """The rounded weights [out, in], float32, in `out` if that is given: what `finish` will decode to, bit for bit."""
    if use_kernels() and learned.weight.device.type == "cpu":
        from roundel.ops.numba.learned_rounding import round_kernel

        return round_kernel(learned, found, torch.empty_like(learned.shift) if out is None else out)
    rounded = round_matrix_reference(learned, found)
    return rounded if out is None else out.copy_(rounded)


def round_matrix_reference(learned: Learned, found: Range) -> Tensor:
    """`round_matrix` in plain torch, on any device."""
    rounded = _nearest(_steps(learned, found), learned.grid, found) * found.scale[..., None]
    return flat(rounded if found.base is None else rounded + found.base[..., None], learned)


def at(learned: Learned, found: Range) -> tuple[Tensor, Tensor, Tensor]:
    """(steps, nearest, inside), each in blocks [out, blocks, columns]; inside: where no code is clamped, as `gradients`
    has it."""
    steps = _steps(learned, found)
    nearest = _nearest(steps, learned.grid, found)
    if learned.grid.scale == "E8M0":
        return steps, nearest, steps.abs() <= learned.grid.element.hi
    return steps, nearest, (steps - nearest).abs() <= 0.5


def finish(learned: Learned) -> QuantizedTensor:
    """The codes, scales and zero points that the present shifts and factors come to; a slab of rows at a time."""
    grid, found = learned.grid, fit_range(learned)
    out, width = learned.weight.shape
    rows = max(1, SLAB // width)
    parts = (slice(start, start + rows) for start in range(0, out, rows))
    codes = torch.cat([_codes(_rows(learned, part), _range_rows(found, part)) for part in parts])
    if grid.scale == "E8M0":
        exponents = (torch.frexp(found.scale).exponent - 1 + 127).to(torch.uint8)
        return QuantizedTensor(grid=grid, codes=codes, scale=exponents.view(torch.float8_e8m0fnu))
    if grid.rule == "ggml":
        scale, base = _levels(found.scale, learned.unit, grid.scale), _levels(found.base, learned.low_unit, grid.offset)
        assert scale is not None
        return QuantizedTensor(grid=grid, codes=codes, scale=scale, offset=base)
    return QuantizedTensor(
        grid=grid,
        codes=codes,
        scale=found.scale.half(),
        zero=None if grid.symmetric else found.zero.to(torch.uint8),
    )


def _levels(values: Tensor | None, unit: Tensor | None, grid: Grid | str | None) -> Tensor | QuantizedTensor | None:
    """Scales or bases as they are stored: float16, or levels of what a super-block shares."""
    if values is None or unit is None or not isinstance(grid, Grid):
        return None if values is None else values.half()
    kind = torch.int8 if grid.element.lo < 0 else torch.uint8
    blocks = grid.block[1]
    return QuantizedTensor(
        grid=grid, codes=torch.round(values / unit).to(kind), scale=unit[:, ::blocks].contiguous().half()
    )


def _codes(learned: Learned, found: Range) -> Tensor:
    grid, steps = learned.grid, _steps(learned, found)
    if grid.scale == "E8M0":
        return flat(round_e2m1(steps) if grid.element.name == "e2m1" else round_e4m3(steps), learned)
    codes = _nearest(steps, grid, found) + found.zero[..., None]
    return flat(codes.to(torch.int8 if grid.symmetric else torch.uint8), learned)


def _rows(learned: Learned, part: slice) -> Learned:
    """Some rows; what is learned of them is shared."""
    optional = (learned.low, learned.lower, learned.unit, learned.low_unit, learned.still)
    low, lower, unit, low_unit, still = (None if each is None else each[part] for each in optional)
    weight, shift, high, upper = (each[part] for each in (learned.weight, learned.shift, learned.high, learned.upper))
    changed = replace(learned, weight=weight, shift=shift, low=low, high=high, lower=lower, upper=upper)
    return replace(changed, unit=unit, low_unit=low_unit, still=still)


def _range_rows(found: Range, part: slice) -> Range:
    return Range(scale=found.scale[part], zero=found.zero[part], base=None if found.base is None else found.base[part])


def _steps(learned: Learned, found: Range) -> Tensor:
    """(weight - base) / scale + shift in blocks [out, blocks, columns]."""
    weight = grouped(learned.weight.float(), learned.columns)
    if found.base is not None:
        weight = weight - found.base[..., None]
    return weight / found.scale[..., None] + grouped(learned.shift, learned.columns)


def _nearest(steps: Tensor, grid: Grid, found: Range) -> Tensor:
    """Code values counted from zero, in blocks."""
    if grid.scale == "E8M0":
        if grid.element.name == "e2m1":
            return code_values(round_e2m1(steps), grid)
        return round_e4m3(steps).float()
    zero = found.zero[..., None]
    return torch.round(steps.clamp(grid.element.lo - zero, grid.element.hi - zero))


def flat(blocks: Tensor, learned: Learned) -> Tensor:
    """[out, blocks, columns] -> [out, in]"""
    return blocks.flatten(1)[:, : learned.weight.shape[1]].contiguous()


def _stored(scale: Tensor, narrow: bool) -> Tensor:
    """Rounded to float16, at least SMALLEST_SCALE in magnitude and finite; float32. narrow: to bfloat16 first."""
    # Of what bfloat16 has, float16 takes all within its range: below 2^-14 both are multiples of its least number.
    smallest = torch.tensor(SMALLEST_SCALE, dtype=torch.float16).item()
    largest = LARGEST_NARROW if narrow else LARGEST_SCALE
    scale = scale.bfloat16().float() if narrow else scale
    half = scale.half().float().clamp(-largest, largest)
    return torch.where(half < 0, half.clamp(max=-smallest), half.clamp(min=smallest))
