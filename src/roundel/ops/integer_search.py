"""The scale (and zero point) of each block of integers, by the squared error of its weights with their importance.

For a block w with importance i, over steps s, zero points z and codes: minimize  sum i * (w - s * k)^2  with
k = clamp(round(w / s), -z, largest - z). Three observations make the search short and nearly exact:

- the codes of a trial step have a best step of their own, by least squares: s + C / B, with e = w - s * k,
  C = sum i * e * k and B = sum i * k^2; its error is E - C^2 / B, with E = sum i * e^2. So a trial judges a whole
  neighbourhood of steps, and few trials are needed;
- at a fixed step the error is convex in z (moving the window of codes clips more on one side and less on the other),
  so the best window is found by walking;
- a symmetric grid is two windows: with a positive scale the codes reach down to -2^(bits-1), with a negative one, up.

Trials are made from wide steps to narrow ones, then again around the best; then least squares and rounding of the step
to the float16 that is stored alternate. What is kept is judged with the scale as stored, in float64, beside plain
rounding: no block ends worse. Everything else is float32.

The importance is that of auto-round's optimized RTN, and of llama.cpp's imatrix before it; the least-squares trials
follow llama.cpp's make_qx_quants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roundel.ops.fit import SMALLEST_SCALE, grouped
from roundel.ops.weighted_error import CHUNK, counts_of
from roundel.scheme import Grid
from roundel.tensor import QuantizedTensor, plain

__all__ = ["BETTER", "NEIGHBOURS", "REFINEMENTS", "SHARE", "Ladder", "ladder", "search_integers"]

SHARE = 1e-4  # codes that hold less of a block's energy than this have no least-squares step worth its noise
NEIGHBOURS = 2.0  # spacings of the first round that the second reaches to each side
REFINEMENTS = 4
BETTER = 0.99999  # a trial must be better by this factor, so that equal codes are no reason to change


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """The steps that are tried, in each of two rounds.

    count     steps of a round
    widest    the first step, in units of the one that spans the range without clipping
    finest    the last step, in units of the block's root mean square (weighted by importance), at most 0.8 of the
              spanning step
    """

    count: int
    widest: float
    finest: float


# The finest steps lie below all optima of 128 normal or Student-t weights whose importances differ a thousandfold;
# more bits need more steps, because a code moves at the same relative change of the step.
_LADDERS = {
    1: Ladder(count=16, widest=2.2, finest=0.5),
    2: Ladder(count=16, widest=2.2, finest=0.5),
    3: Ladder(count=16, widest=1.6, finest=0.27),
    4: Ladder(count=20, widest=1.6, finest=0.15),
    5: Ladder(count=28, widest=1.6, finest=0.08),
    6: Ladder(count=36, widest=1.6, finest=0.043),
    7: Ladder(count=48, widest=1.6, finest=0.023),
    8: Ladder(count=64, widest=1.6, finest=0.012),
}


def ladder(bits: int) -> Ladder:
    """The steps that are tried for a number of bits."""
    return _LADDERS[bits]


def search_integers(weight: Tensor, plainly: QuantizedTensor, importance: Tensor | None) -> QuantizedTensor:
    """The matrix under better scales than plain rounding's, where there are such. See `search.search`."""
    grid, (out, width) = plainly.grid, plainly.shape
    columns = grid.block_of((out, width))[1]
    counted = counts_of(weight, importance, columns)
    scale, zero = plain(plainly.scale).clone(), None if plainly.zero is None else plainly.zero.clone()
    codes = plainly.codes.clone()
    rows = max(1, CHUNK // max(1, width))
    for start in range(0, out, rows):
        at = slice(start, min(out, start + rows))
        groups = grouped(weight[at].float(), columns)
        flat = groups.reshape(-1, columns)
        counts = counted.expand_as(groups).reshape(-1, columns)
        begun = None if zero is None else zero[at].reshape(-1)
        best_scale, best_zero = _search_blocks(flat, counts, grid, scale[at].reshape(-1), begun)
        scale[at] = best_scale.view_as(scale[at])
        whole = torch.round(flat / best_scale[:, None])
        if zero is not None and best_zero is not None:
            zero[at] = best_zero.view_as(zero[at])
            whole = whole + best_zero.float()[:, None]
        made = whole.clamp(grid.element.lo, grid.element.hi).view_as(groups).flatten(1)[:, :width]
        codes[at] = made.to(codes.dtype)
    return QuantizedTensor(grid=grid, codes=codes, scale=scale.half(), zero=zero)


@dataclass(frozen=True)
class _Blocks:
    """Blocks to be searched: weights and importance [blocks, n] float32; of each block the energy sum i * w^2, and
    the magnitudes of its highest and lowest weight beyond 0."""

    weight: Tensor
    importance: Tensor
    energy: Tensor
    high: Tensor
    low: Tensor
    largest: int


@dataclass
class _Best:
    """What the trials found so far, each [blocks]: the score, the trial step it was found at, its zero point, and the
    least-squares step of its codes."""

    score: Tensor
    trial: Tensor
    zero: Tensor
    step: Tensor

    def offer(self, score: Tensor, trial: Tensor, zero: Tensor, step: Tensor, allowed: Tensor) -> None:
        better = allowed & (score < BETTER * self.score)
        for name, value in (("score", score), ("trial", trial), ("zero", zero), ("step", step)):
            setattr(self, name, torch.where(better, value, getattr(self, name)))


def _search_blocks(
    weight: Tensor, importance: Tensor, grid: Grid, scale: Tensor, zero: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Better scales [blocks] float32 (of float16 values) and zero points, given plain rounding's."""
    bits, half = grid.element.bits, 2 ** (grid.element.bits - 1)
    energy = (importance * weight * weight).sum(-1)
    high, low = weight.amax(-1).clamp(min=0), -weight.amin(-1).clamp(max=0)
    blocks = _Blocks(weight, importance, energy, high, low, 2**bits - 1)
    spanning = torch.maximum(high, low) / half if zero is None else (high + low) / blocks.largest
    windows = (half, half - 1) if zero is None else None
    best = _tried(blocks, spanning, windows, bits, grid.lowest_zero)
    step, window = _refined(blocks, best)
    if zero is None:
        found, same = torch.where(window == half, step, -step), None
    else:
        found, same = step, window.to(torch.uint8)
    error, baseline = (_stored_error(blocks, s, z, grid) for s, z in ((found, same), (scale, zero)))
    better = (spanning > 0) & torch.isfinite(scale) & (error < baseline)
    if zero is None or same is None:
        return torch.where(better, found, scale), None
    return torch.where(better, found, scale), torch.where(better, same, zero)


def _tried(blocks: _Blocks, spanning: Tensor, windows: tuple[int, ...] | None, bits: int, lowest_zero: int) -> _Best:
    """Both rounds of trials. windows: the zero points of a symmetric grid; None where they are found by walking."""
    rungs = ladder(bits)
    spanning = spanning.clamp(min=torch.finfo(torch.float32).tiny)
    total = blocks.importance.sum(-1)
    mean = (blocks.importance * blocks.weight).sum(-1) / total
    power = blocks.energy / total
    # A block far from zero spreads less than its size says; a third of its size is as narrow as it is taken to be.
    spread_ = power.sqrt() if windows else torch.maximum(power - mean * mean, power / 9).sqrt()
    widest = spanning * rungs.widest
    finest = torch.minimum(rungs.finest * spread_, 0.8 * spanning)
    ratio = (finest / widest).clamp(min=1e-6) ** (1 / (rungs.count - 1))
    nothing = torch.full_like(spanning, torch.inf)
    best = _Best(nothing, widest, torch.zeros_like(spanning), widest)
    zero = torch.round(blocks.low / widest).clamp(lowest_zero, blocks.largest)
    _round(blocks, best, widest, ratio, zero, windows, rungs.count, lowest_zero)
    narrower = ratio ** (2 * NEIGHBOURS / (rungs.count - 1))
    first = best.trial * ratio**-NEIGHBOURS
    _round(blocks, best, first, narrower, best.zero, windows, rungs.count, lowest_zero)
    return best


def _round(
    blocks: _Blocks,
    best: _Best,
    step: Tensor,
    ratio: Tensor,
    zero: Tensor,
    windows: tuple[int, ...] | None,
    count: int,
    lowest_zero: int,
) -> None:
    """`count` trial steps from `step` on, each `ratio` times the one before; `best` is kept up to date."""
    centre = 0.5 * blocks.largest
    everywhere = torch.ones_like(step, dtype=torch.bool)
    for _ in range(count):
        if windows:
            for window in windows:
                at = torch.full_like(step, window)
                _, score, fitted = _trial(blocks, step, at)
                best.offer(score, step, at, fitted, everywhere)
        else:
            zero = _walked(blocks, best, step, zero, lowest_zero)
        narrowed = step * ratio
        if not windows:  # the middle of the window stays where it is
            zero = torch.round(centre - (centre - zero) * (step / narrowed)).clamp(lowest_zero, blocks.largest)
        step = narrowed


def _walked(blocks: _Blocks, best: _Best, step: Tensor, zero: Tensor, lowest_zero: int) -> Tensor:
    """The zero point of least error at a step, reached from `zero` one by one; every trial is offered to `best`.

    The window moves only towards an end where it clips.
    """
    error, score, fitted = _trial(blocks, step, zero)
    walking = torch.ones_like(step, dtype=torch.bool)
    best.offer(score, step, zero, fitted, walking)
    still = walking
    for direction in (1.0, -1.0):
        walking = still  # only who did not go up tries down
        moved = torch.zeros_like(still)
        while bool(walking.any()):
            ahead = zero + direction
            clipped = (
                torch.round(blocks.low / step) > zero
                if direction > 0
                else (torch.round(blocks.high / step) > blocks.largest - zero)
            )
            walking = walking & clipped & (ahead >= lowest_zero) & (ahead <= blocks.largest)
            tried, score, fitted = _trial(blocks, step, ahead)
            best.offer(score, step, ahead, fitted, walking)
            walking = walking & (tried < error)
            moved |= walking
            error, zero = torch.where(walking, tried, error), torch.where(walking, ahead, zero)
        still = still & ~moved
    return zero


def _trial(blocks: _Blocks, step: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of trial steps and windows [blocks]: the error, the error with the codes' least-squares step, and that step."""
    inverse = 1 / step
    codes = torch.round(blocks.weight * inverse[:, None])
    codes = torch.minimum(torch.maximum(codes, -zero[:, None]), (blocks.largest - zero)[:, None])
    rest = blocks.weight - codes * step[:, None]
    counted = blocks.importance * rest
    error, slope = (counted * rest).sum(-1), (counted * codes).sum(-1)
    held = blocks.energy - 2 * step * slope - error  # s^2 * sum i * k^2
    usable = held > SHARE * blocks.energy
    change = torch.where(usable, slope / held, 0.0) * step  # over the step, so that nothing is squared out of range
    return error, error - change * slope * step, step + change * step


def _refined(blocks: _Blocks, best: _Best) -> tuple[Tensor, Tensor]:
    """The best float16 step [blocks] of the best window: least squares and rounding in turn."""
    step, zero = _as_stored(best.step), best.zero
    kept, least = step, torch.full_like(step, torch.inf)
    for _ in range(REFINEMENTS):
        error, _, fitted = _trial(blocks, step, zero)
        kept, least = torch.where(error < least, step, kept), torch.minimum(error, least)
        step = _as_stored(fitted)
    return kept, zero


def _as_stored(step: Tensor) -> Tensor:
    """The nearest positive step that can be stored, as float32."""
    bounded = step.clamp(max=torch.finfo(torch.float16).max).half()
    return bounded.clamp(min=torch.tensor(SMALLEST_SCALE, dtype=torch.float16).item()).float()


def _stored_error(blocks: _Blocks, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """The error [blocks] of codes as they will be stored, in float64."""
    whole = torch.round(blocks.weight / scale[:, None])
    shift = 0.0 if zero is None else zero.float()[:, None]
    codes = (whole + shift).clamp(grid.element.lo, grid.element.hi) - shift
    rest = blocks.weight.double() - (codes * scale[:, None]).double()
    return (blocks.importance * rest * rest).sum(-1)
