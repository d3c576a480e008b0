"""ggml's block types with less error than its own search leaves: every scale is tried again beside its neighbours.

A block decodes to  step * code - ground; step and ground are float16 numbers of the block, or whole-number levels times
float16 numbers that a super-block shares. ggml chooses block by block and rounds what it found to levels afterwards;
here levels, the shared numbers and the codes are fitted to each other, in turn:

- the shared numbers are made somewhat larger or smaller, the levels following;
- each block's levels move to the best of their neighbours, its codes being rounded anew for every one;
- the codes and levels that there are have the best shared numbers by least squares.

What counts is  sum importance * (weight - decoded)^2; ggml weighs large weights up beyond that. A step is taken where
it lowers this for its super-block, and at the end both are judged in float64 as they are stored: no super-block ends
worse than ggml's. Any device; float32, sums from left to right. `ops/numba/block_tuning.py` holds the faster spelling.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from roundel.ops import use_kernels
from roundel.ops.block_search import nearest_in, over, running_sum
from roundel.ops.encode import encode_blocks
from roundel.scheme import Grid
from roundel.tensor import QuantizedTensor, below_each_other, code_values

__all__ = ["tune_blocks"]

CHUNK = 1 << 16  # weights that are tuned at a time: they stay in the processor's cache
ROUNDS = 3
FACTORS = (0.85, 0.9, 0.95, 1.05, 1.1, 1.18)  # of the shared numbers, of types with levels
WIDE_FACTORS = (0.5, 0.58, 0.66, 0.74, 0.82, 0.88, 0.94, 1.06, 1.12)  # of the scale of a block that has none


@dataclass(frozen=True)
class _Numbers:
    """Of blocks in super-blocks: shared [supers] float32 numbers that a float16 holds, levels [supers, blocks]; of the
    simple types, a super-block is a block whose level is 1. ground, low_levels: likewise, or None."""

    step: Tensor
    levels: Tensor
    ground: Tensor | None
    low_levels: Tensor | None

    @property
    def steps(self) -> Tensor:
        return (self.step[:, None] * self.levels).reshape(-1)

    @property
    def grounds(self) -> Tensor | None:
        if self.ground is None or self.low_levels is None:
            return None
        return (self.ground[:, None] * self.low_levels).reshape(-1)


class _Problem:
    """Weights and importances [n, supers * blocks], a block in each column, and what a grid allows."""

    def __init__(self, x: Tensor, counted: Tensor, grid: Grid, blocks: int) -> None:
        self.x, self.counted, self.grid, self.blocks = x, counted, grid, blocks
        values = grid.element.values  # of ternary types there is a fourth, which not all of them can store
        self.table = None if values is None else tuple(v for v in values if v <= grid.element.hi)
        scale, offset = grid.scale, grid.offset
        self.levels = (scale.element.lo, scale.element.hi) if isinstance(scale, Grid) else None
        self.low_levels = (offset.element.lo, offset.element.hi) if isinstance(offset, Grid) else None

    def values(self, numbers: _Numbers) -> Tensor:
        """The best codes' values [n, blocks] on these numbers."""
        steps, grounds = numbers.steps, numbers.grounds
        inverse = torch.where(steps != 0, over(1, steps), 0.0)
        scaled = (self.x if grounds is None else self.x + grounds) * inverse
        if self.table is not None:
            return code_values(nearest_in(scaled, self.table), self.grid)
        return scaled.round_().clamp_(self.grid.element.lo, self.grid.element.hi)

    def errors(self, numbers: _Numbers) -> Tensor:
        """[supers, blocks]"""
        rest = self.values(numbers).mul_(numbers.steps).sub_(self.x)
        grounds = numbers.grounds
        if grounds is not None:
            rest.sub_(grounds)
        return running_sum(rest.square_().mul_(self.counted).T).view(-1, self.blocks)

    def moved(self, numbers: _Numbers) -> _Numbers:
        """Each block's levels moved by at most one, for the least error of the block."""
        if self.levels is None:
            return numbers
        least = self.errors(numbers)
        best, best_low = numbers.levels, numbers.low_levels
        lows = (-1, 0, 1) if numbers.low_levels is not None else (0,)
        for change in (-1, 0, 1):
            for low_change in lows:
                if change == low_change == 0:
                    continue
                levels = (numbers.levels + change).clamp(*self.levels)
                low_levels = numbers.low_levels
                if low_levels is not None and self.low_levels is not None:
                    low_levels = (low_levels + low_change).clamp(*self.low_levels)
                error = self.errors(replace(numbers, levels=levels, low_levels=low_levels))
                better = error < least
                least, best = torch.where(better, error, least), torch.where(better, levels, best)
                if low_levels is not None and best_low is not None:
                    best_low = torch.where(better, low_levels, best_low)
        return replace(numbers, levels=best, low_levels=best_low)

    def scaled(self, numbers: _Numbers, factor: float, low_factor: float) -> _Numbers:
        """Shared numbers times factors, levels divided by them."""
        levels, low_levels, ground = numbers.levels, numbers.low_levels, numbers.ground
        if self.levels is not None:
            levels = torch.round(levels / factor).clamp(*self.levels)
        if low_levels is not None and ground is not None and self.low_levels is not None:
            low_levels = torch.round(low_levels / low_factor).clamp(*self.low_levels)
            ground = _half(ground * low_factor)
        return _Numbers(_half(numbers.step * factor), levels, ground, low_levels)

    def fitted(self, numbers: _Numbers) -> _Numbers:
        """The shared numbers of least squares for the levels, and the codes, that there are."""
        supers = numbers.step.shape[0]
        spread = self.values(numbers).mul_(numbers.levels.reshape(-1))
        counted = self.counted * spread

        def total(terms: Tensor) -> Tensor:
            return running_sum(running_sum(terms.T).view(supers, -1))

        square, product = total(counted * spread), total(counted * self.x)
        if numbers.low_levels is None:
            step = torch.where(square > 0, product / square, numbers.step)
            return replace(numbers, step=_half(step))
        assert numbers.ground is not None
        lows = numbers.low_levels.reshape(-1)
        weighed = self.counted * lows
        crossed, low_square, low_product = total(counted * lows), total(weighed * lows), total(weighed * self.x)
        # x = step * spread - ground * lows
        determinant = square * low_square - crossed * crossed
        sound = determinant > 1e-6 * square * low_square
        step = torch.where(sound, (product * low_square - low_product * crossed) / determinant, numbers.step)
        ground = torch.where(sound, (product * crossed - low_product * square) / determinant, numbers.ground)
        return replace(numbers, step=_half(step), ground=_half(ground))


def tune_blocks(weight: Tensor, grid: Grid, importance: Tensor | None = None, threads: int = 1) -> QuantizedTensor:
    """A matrix on a block type with float16 scales, each super-block with at most the error that ggml leaves there,
    with these importances or without.

    weight       [out, in] float, finite
    importance   [in], at least 0; None: all columns alike
    threads      over rows; the result does not depend on it
    """
    out, width = weight.shape
    rows = max(1, CHUNK // max(1, width))
    counted = (
        torch.ones(width, dtype=torch.float32, device=weight.device)
        if importance is None
        else importance.to(weight.device).float()
    )

    def part(begin: int) -> QuantizedTensor:
        x = weight[begin : begin + rows].float()
        start = better_of(x, encode_blocks(x, grid), encode_blocks(x, grid, counted), counted)
        return _tuned(x, start, counted)

    begins = range(0, max(out, 1), rows)
    if threads == 1:
        return below_each_other([part(begin) for begin in begins])
    with ThreadPoolExecutor(threads) as pool:
        return below_each_other(list(pool.map(part, begins)))


def _tuned(weight: Tensor, start: QuantizedTensor, counted: Tensor) -> QuantizedTensor:
    grid, (out, width) = start.grid, start.shape
    n = grid.block[1]
    numbers = _numbers(start)
    problem = _Problem(_columns(weight, n), _columns(counted.expand(out, width), n), grid, numbers.levels.shape[1])
    factors = _factors(grid)
    if use_kernels() and weight.device.type == "cpu" and problem.table is None and weight.numel():
        numbers = _tuned_by_kernel(weight, counted, problem, numbers, factors)
    else:
        numbers = _tuned_numbers(problem, numbers, factors)
    return better_of(weight, start, _tensor(problem, numbers, grid, (out, width)), counted)


def _factors(grid: Grid) -> list[tuple[float, float]]:
    """By what the shared step and ground are multiplied, trial by trial."""
    if not isinstance(grid.scale, Grid):
        return [(factor, 1.0) for factor in (WIDE_FACTORS if grid.offset is None else ())]
    grounds = FACTORS if grid.offset is not None else ()
    return [*((factor, 1.0) for factor in FACTORS), *((1.0, factor) for factor in grounds)]


def _tuned_numbers(problem: _Problem, numbers: _Numbers, factors: Sequence[tuple[float, float]]) -> _Numbers:
    least = running_sum(problem.errors(numbers))

    def offer(tried: _Numbers) -> None:
        nonlocal numbers, least
        error = running_sum(problem.errors(tried))
        better = error < least
        least, numbers = torch.where(better, error, least), _chosen(better, tried, numbers)

    begun = numbers
    for factor, low_factor in factors:
        offer(problem.fitted(problem.scaled(begun, factor, low_factor)))
    for _ in range(ROUNDS):
        offer(problem.moved(numbers))
        offer(problem.fitted(numbers))
    return numbers


def _tuned_by_kernel(
    weight: Tensor, counted: Tensor, problem: _Problem, numbers: _Numbers, factors: Sequence[tuple[float, float]]
) -> _Numbers:
    """`_tuned_numbers`, the same bits."""
    import numpy as np

    from roundel.ops.numba.block_tuning import tune

    supers, blocks = numbers.levels.shape
    grounded = numbers.ground is not None and numbers.low_levels is not None
    nothing = torch.zeros_like(numbers.step), torch.zeros_like(numbers.levels)
    ground, low_levels = (numbers.ground, numbers.low_levels) if grounded else nothing
    assert ground is not None and low_levels is not None
    spread = [numbers.step[:, None].expand(supers, blocks), numbers.levels]
    spread += [ground[:, None].expand(supers, blocks), low_levels]
    given = torch.stack(spread).view(4, -1).contiguous().numpy()
    ones, zeros = (1.0, 1.0), (0.0, 0.0)
    bounds = (*(problem.levels or ones), *(problem.low_levels or (ones if grounded else zeros)))
    element = problem.grid.element
    rows = weight.contiguous().numpy().reshape(-1, problem.grid.block[1])
    known = counted.contiguous().numpy()
    trials = np.array(factors, np.float32).reshape(-1, 2)
    limits = np.float32(element.lo), np.float32(element.hi)
    tune(rows, known, given, blocks, *limits, np.array(bounds, np.float32), trials, ROUNDS)
    step, levels, ground, low_levels = torch.from_numpy(given).view(4, supers, blocks).unbind()
    found = _Numbers(step[:, 0].contiguous(), levels, None, None)
    return replace(found, ground=ground[:, 0].contiguous(), low_levels=low_levels) if grounded else found


def _columns(values: Tensor, n: int) -> Tensor:
    """[out, in] -> [n, blocks], contiguous."""
    return values.reshape(-1, n).T.contiguous()


def better_of(weight: Tensor, first: QuantizedTensor, second: QuantizedTensor, counted: Tensor) -> QuantizedTensor:
    """Of two roundings to one block type, for every super-block that of less error in float64; the first of equals."""
    per_super = first.grid.row_columns

    def error(tensor: QuantizedTensor) -> Tensor:
        rest = (weight.double() - tensor.decode().double()).square_()
        return (rest * counted.double()).view(rest.shape[0], -1, per_super).sum(-1)

    return _merged(error(second) < error(first), second, first)


def _merged(better: Tensor, first: QuantizedTensor, second: QuantizedTensor) -> QuantizedTensor:
    def taken(
        a: Tensor | QuantizedTensor | None, b: Tensor | QuantizedTensor | None
    ) -> Tensor | QuantizedTensor | None:
        if isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor):
            return _merged(better, a, b)
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return None
        return torch.where(better.repeat_interleave(a.shape[1] // better.shape[1], 1), a, b)

    codes, scale = taken(first.codes, second.codes), taken(first.scale, second.scale)
    assert isinstance(codes, Tensor) and scale is not None
    return replace(first, codes=codes, scale=scale, offset=taken(first.offset, second.offset))


def _numbers(tensor: QuantizedTensor) -> _Numbers:
    scale, offset = tensor.scale, tensor.offset
    if isinstance(scale, QuantizedTensor):
        step = _shared(scale)
        ground = -_shared(offset) if isinstance(offset, QuantizedTensor) else None
        low_levels = None if ground is None or not isinstance(offset, QuantizedTensor) else offset.codes.float()
        levels = scale.codes.float().reshape(len(step), -1)
        return _Numbers(step, levels, ground, None if low_levels is None else low_levels.reshape(len(step), -1))
    step = scale.float().reshape(-1)
    ones = torch.ones_like(step)[:, None]
    if not isinstance(offset, Tensor):
        return _Numbers(step, ones, None, None)
    return _Numbers(step, ones, -offset.float().reshape(-1), ones)


def _shared(tensor: QuantizedTensor) -> Tensor:
    assert isinstance(tensor.scale, Tensor), "two levels of scales"
    return tensor.scale.float().reshape(-1)


def _tensor(problem: _Problem, numbers: _Numbers, grid: Grid, shape: tuple[int, int]) -> QuantizedTensor:
    out = shape[0]
    if problem.table is None:
        codes = problem.values(numbers)
        codes = codes.to(torch.int8 if grid.element.lo < 0 else torch.uint8)
    else:
        steps = numbers.steps
        scaled = problem.x * torch.where(steps != 0, over(1, steps), 0.0)
        codes = nearest_in(scaled, problem.table).to(torch.uint8)
    codes = codes.T.reshape(shape)
    step = numbers.step.half().reshape(out, -1)
    ground = None if numbers.ground is None else -numbers.ground.half().reshape(out, -1)
    if not isinstance(grid.scale, Grid):
        return QuantizedTensor(grid=grid, codes=codes, scale=step, offset=ground)
    kind = torch.int8 if grid.scale.element.lo < 0 else torch.uint8
    scale = QuantizedTensor(grid=grid.scale, codes=numbers.levels.to(kind).reshape(out, -1), scale=step)
    offset = None
    if isinstance(grid.offset, Grid) and ground is not None and numbers.low_levels is not None:
        lows = numbers.low_levels.to(torch.uint8).reshape(out, -1)
        offset = QuantizedTensor(grid=grid.offset, codes=lows, scale=ground)
    return QuantizedTensor(grid=grid, codes=codes, scale=scale, offset=offset)


def _chosen(better: Tensor, first: _Numbers, second: _Numbers) -> _Numbers:
    ground, low_levels = second.ground, second.low_levels
    if first.ground is not None and ground is not None:
        ground = torch.where(better, first.ground, ground)
    if first.low_levels is not None and low_levels is not None:
        low_levels = torch.where(better[:, None], first.low_levels, low_levels)
    return _Numbers(
        torch.where(better, first.step, second.step),
        torch.where(better[:, None], first.levels, second.levels),
        ground,
        low_levels,
    )


def _half(values: Tensor) -> Tensor:
    """As float16 holds them, finite; float32."""
    largest = torch.finfo(torch.float16).max
    return torch.nan_to_num(values).clamp(-largest, largest).half().float()
