"""Steps against a gradient, of shifts and of range factors (`learned_rounding`). Definitions, in float32.

Gradients pass straight through rounding (Bengio et al., 2013), of codes, of a power of two's exponent and of levels
alike, and stop where a code is clamped. Two ways to step along a gradient: by its sign, as SignRound's paper has it, or
divided by the root of its running mean square (Adam: Kingma and Ba 2014, arXiv 1412.6980, algorithm 1, with a first
moment of short memory and no epsilon).

`ops/numba/learned_rounding.py` holds the faster spelling of `descend`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from roundel.ops import use_kernels
from roundel.ops.fit import grouped
from roundel.ops.learned_rounding import LARGEST_FACTOR, Learned, Range, at, flat

__all__ = [
    "FIRST",
    "LEAST_SQUARE",
    "SECOND",
    "Gradients",
    "Memory",
    "Moments",
    "adam",
    "adam_correction",
    "descend",
    "gradients",
    "remember",
]

# Adam's betas. A first moment of long memory slows what it should steady: see docs/algorithms.md.
FIRST, SECOND = 0.5, 0.99
LEAST_SQUARE = 1e-36  # below, float32 has no digits left
SMALLEST_FACTOR = 2.0**-24  # is divided by; 0 is allowed


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Of a loss: with respect to shift [out, in], low [out, blocks] (None on symmetric grids) and high."""

    shift: Tensor
    low: Tensor | None
    high: Tensor


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What Adam remembers of the gradients by one tensor, changed in place: running means, 0 at the start."""

    first: Tensor
    second: Tensor


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Adam's memory of one matrix: of its shift and of its factors, as `Learned` has them."""

    shift: Moments
    low: Moments | None
    high: Moments


def gradients(learned: Learned, found: Range, gradient: Tensor) -> Gradients:
    """From the gradient [out, in] of a loss with respect to the rounded weights.

    With inside = 1 where |steps - nearest| <= 1/2 (integers) or |steps| <= largest (MX), else 0:
    by shift = gradient * scale * inside;  by scale = sum of gradient * (nearest - inside * (weight - base) / scale);
    by zero = sum of -gradient * scale * (1 - inside);  by base = sum of gradient * (1 - inside).
    """
    steps, nearest, inside = at(learned, found)
    spread = grouped(gradient, learned.columns)
    by_scale = (spread * (nearest - inside * (steps - grouped(learned.shift, learned.columns)))).sum(-1)
    clamped = (spread * ~inside).sum(-1)
    low, high = _by_factors(learned, found, by_scale, clamped)
    return Gradients(shift=flat(spread * found.scale[..., None] * inside, learned), low=low, high=high)


def _by_factors(learned: Learned, found: Range, by_scale: Tensor, clamped: Tensor) -> tuple[Tensor | None, Tensor]:
    """Gradients by low and high, from that by scale and from the sum of gradients where codes are clamped."""
    if learned.grid.rule == "ggml" and learned.grid.scale != "E8M0":
        return None if learned.lower is None else clamped * learned.lower, by_scale * learned.upper
    if learned.low is None or learned.lower is None:
        # MX: the scale is proportional to high once the rounding of its exponent is passed straight through.
        is_float = learned.grid.scale == "E8M0"
        return None, by_scale * (found.scale / learned.high.clamp(min=SMALLEST_FACTOR) if is_float else learned.upper)
    largest, end = learned.grid.element.hi, learned.lower * learned.low
    by_zero = -clamped * found.scale * (torch.round(-end / found.scale) == found.zero)  # 0 where zero is clamped
    by_scale = by_scale + by_zero * end / found.scale.square()
    by_lower = -by_scale / largest - by_zero / found.scale
    return by_lower * learned.lower, by_scale / largest * learned.upper


def remember(learned: Learned) -> Memory:
    """An empty memory."""
    low = None if learned.low is None else _no_moments(learned.low)
    return Memory(shift=_no_moments(learned.shift), low=low, high=_no_moments(learned.high))


def _no_moments(values: Tensor) -> Moments:
    return Moments(first=torch.zeros_like(values), second=torch.zeros_like(values))


def descend(
    learned: Learned,
    found: Range,
    gradient: Tensor,
    *,
    rate: float,
    range_rate: float,
    memory: Memory | None = None,
    step: int = 1,
) -> None:
    """Move shift and factors against a gradient, in place, and the memory with them.

    gradient   [out, in], of the loss with respect to the rounded weights; counts as 0 in blocks that are still
    rate, range_rate   the size of the step, of shifts and of factors
    memory     None: along the sign of the gradient. Else as `adam` says
    step       how many steps the memory has seen with this one
    """
    if learned.still is not None:
        gradient = flat(grouped(gradient, learned.columns).masked_fill(learned.still[..., None], 0.0), learned)
    shift = None if memory is None else memory.shift
    if use_kernels() and learned.weight.device.type == "cpu":
        from roundel.ops.numba.learned_rounding import descend_kernel

        by_scale, clamped = descend_kernel(learned, found, gradient, rate, shift, step)
        low, high = _by_factors(learned, found, by_scale, clamped)
    else:
        by = gradients(learned, found, gradient)
        _move(learned.shift, by.shift, rate, shift, step)
        low, high = by.low, by.high
    _move(learned.high, high, range_rate, None if memory is None else memory.high, step)
    if learned.low is not None and low is not None:
        _move(learned.low, low, range_rate, None if memory is None else memory.low, step)
    clamp_factors(learned)


def _move(values: Tensor, gradient: Tensor, rate: float, moments: Moments | None, step: int) -> None:
    values.sub_(rate * (gradient.sign() if moments is None else adam(gradient, moments, step)))


def adam(gradient: Tensor, moments: Moments, step: int) -> Tensor:
    """The direction of a step, about 1 in size; the moments are brought up to date in place.

    first = FIRST * first + (1 - FIRST) * gradient;  second = SECOND * second + (1 - SECOND) * gradient^2;
    direction = first / (1 - FIRST^step) / sqrt(second / (1 - SECOND^step)), and 0 where second is below LEAST_SQUARE.
    """
    moments.first.mul_(FIRST).add_(gradient * (1 - FIRST))
    moments.second.mul_(SECOND).add_(gradient * gradient * (1 - SECOND))
    direction = moments.first / moments.second.sqrt() * adam_correction(step)
    return torch.where(moments.second < LEAST_SQUARE, 0.0, direction)


def adam_correction(step: int) -> float:
    """By what the ratio of moments that began at 0 is to be multiplied."""
    return math.sqrt(1 - SECOND**step) / (1 - FIRST**step)


def clamp_factors(learned: Learned) -> None:
    """Bring factors back within 0 and LARGEST_FACTOR, in place."""
    learned.high.clamp_(0.0, LARGEST_FACTOR)
    if learned.low is not None:
        learned.low.clamp_(0.0, LARGEST_FACTOR)
