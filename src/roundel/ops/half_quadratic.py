"""Scales and zero points by half-quadratic splitting: HQQ (Badri & Shaji 2023, mobiusml.github.io/hqq_blog).

Minimized is sum |w - decoded|^p of each block, p < 1, which forgives few large errors for many small ones. Splitting it
by an auxiliary e gives two steps in turn, beta growing by kappa each time:

    e = shrink(w - decoded) = sign(r) * max(0, |r| - |r|^(p-1) / beta),  r = w - decoded    (equation 3 of the text)
    scale, zero = least squares of  w - e ~ scale * (codes - zero),  then codes anew

HQQ's second step moves the zero point alone, zero = mean(codes - (w - e) / scale), and stores it as a float. The zero
points of GPTQ, AWQ and compressed-tensors files are whole numbers, and moving one by a whole step gains next to
nothing. So here both are fitted: the line through (codes, w - e) gives a zero point that is no whole number, its two
whole neighbours get their best scale each, and the better of them by squares is taken. Where zero points are floats
(HQQ's own files), the line is taken as it is. A symmetric grid has its zero
point fixed, and its scale fitted. What is kept is the best by the p-norm with parameters as they are stored, in
float64, plain rounding's among them; HQQ keeps its last, which is one step past its best.

Weights are taken as they are, as in HQQ: r below (1/beta)^(1/(2-p)), 0.17 at the defaults, shrinks to nothing, so that
on language models the first step mostly gives 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roundel.ops.decode import decode
from roundel.ops.encode import encode_reference
from roundel.ops.fit import SMALLEST_SCALE, grouped
from roundel.ops.search import Searched
from roundel.scheme import Grid
from roundel.tensor import QuantizedTensor, plain

__all__ = ["BETTER", "Splitting", "norm_error", "solve", "solve_reference"]

CHUNK = 1 << 17  # weights solved at a time by the definition
BETTER = 0.99999  # the norm must fall by this factor, so that the last bits of sums decide nothing


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """The constants: iterations, the norm p (0 to 1), beta at the start, and kappa, its growth."""

    iterations: int = 20
    norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01

    @property
    def untouched(self) -> float:
        """Errors up to here are shrunk to 0 in every iteration."""
        last = self.beta * max(1.0, self.kappa ** max(0, self.iterations - 1))
        return float((1 / last) ** (1 / (2 - self.norm)))


def solve(weight: Tensor, grid: Grid, how: Splitting, threads: int = 1) -> Searched:
    """Round a matrix to integers, parameters by half-quadratic splitting from plain rounding's on.

    weight    [out, in], any float dtype, finite; solved as float32
    returns   the tensor, and sum |w - decoded|^p with it and with plain rounding
    """
    from roundel.ops import use_kernels

    weight = weight.detach()
    if use_kernels() and weight.device.type == "cpu" and weight.numel():
        if grid.has_float_zeros:
            from roundel.ops.numba.float_zeros import solve_floats

            return solve_floats(weight, grid, how, threads)
        from roundel.ops.numba.half_quadratic import solve_tensor

        return solve_tensor(weight, grid, how, threads)
    return solve_reference(weight, grid, how)


def solve_reference(weight: Tensor, grid: Grid, how: Splitting) -> Searched:
    """`solve` in plain torch, on any device."""
    plainly = encode_reference(weight, grid)
    (out, width), columns = plainly.shape, grid.block_of(plainly.shape)[1]
    scale, codes = plain(plainly.scale).clone(), plainly.codes.clone()
    zero = None if plainly.zero is None else plainly.zero.clone()
    present = grouped(torch.ones(1, width, dtype=torch.float32, device=weight.device), columns)
    rows = max(1, CHUNK // max(1, width))
    for start in range(0, out, rows):
        at = slice(start, min(out, start + rows))
        groups = grouped(weight[at].float(), columns)
        begun = None if zero is None else zero[at]
        solved = _solved_floats if grid.has_float_zeros else _solved
        found, same = solved(groups, present, grid, scale[at], begun, how)
        scale[at] = found
        if zero is not None and same is not None:
            zero[at] = same
        made = _coded(groups, found, same, grid)
        codes[at] = made.flatten(1)[:, :width].to(codes.dtype)
    found_tensor = QuantizedTensor(grid=grid, codes=codes, scale=scale.half(), zero=zero)
    error, baseline = (norm_error(weight, q, how.norm) for q in (found_tensor, plainly))
    return Searched(tensor=found_tensor, error=error, baseline=baseline)


def norm_error(weight: Tensor, quantized: QuantizedTensor, norm: float) -> float:
    """sum |weight - decoded|^norm in float64, a slab of rows at a time."""
    decoded, total = decode(quantized), 0.0
    rows = max(1, CHUNK // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        lost = weight[start : start + rows].double() - decoded[start : start + rows].double()
        total += float(lost.abs().pow(norm).sum())
    return total


def _solved(
    weight: Tensor, present: Tensor, grid: Grid, scale: Tensor, zero: Tensor | None, how: Splitting
) -> tuple[Tensor, Tensor | None]:
    """Better scales and zero points of blocks [rows, groups, n], given plain rounding's [rows, groups]."""
    half, largest = 2.0 ** (grid.element.bits - 1), 2.0**grid.element.bits - 1
    step = scale.abs()
    # A negative scale of a symmetric grid is a positive one whose codes reach up instead of down.
    window = torch.where(scale > 0, half, half - 1) if zero is None else zero.float()
    kept_step, kept_window = step, window
    least = torch.full_like(step, torch.inf)
    counts, beta = present.sum(-1).expand_as(step), how.beta
    for _ in range(how.iterations + 1):
        codes = torch.round(weight * (1 / step)[..., None])
        codes = torch.minimum(torch.maximum(codes, -window[..., None]), (largest - window)[..., None])
        rest = weight - codes * step[..., None]
        size = rest.abs()
        error = size.pow(how.norm).sum(-1)
        better = error < BETTER * least
        least = torch.where(better, error, least)
        kept_step, kept_window = torch.where(better, step, kept_step), torch.where(better, window, kept_window)
        shrunk = (size - size.clamp(min=1e-30).pow(how.norm - 1) / beta).clamp(min=0)
        target = weight - torch.sign(rest) * shrunk
        step, window = _least_squares(target, codes, counts, step, window, zero is None, grid.lowest_zero, largest)
        beta *= how.kappa
    if zero is None:
        found, same = torch.where(kept_window == half, kept_step, -kept_step), None
    else:
        found, same = kept_step, kept_window.to(torch.uint8)
    ours, plainly = (_stored_error(weight, s, z, grid, how.norm) for s, z in ((found, same), (scale, zero)))
    better = torch.isfinite(scale) & (ours < BETTER * plainly)
    if zero is None or same is None:
        return torch.where(better, found, scale), None
    return torch.where(better, found, scale), torch.where(better, same, zero)


def _solved_floats(
    weight: Tensor, present: Tensor, grid: Grid, scale: Tensor, zero: Tensor | None, how: Splitting
) -> tuple[Tensor, Tensor]:
    """`_solved` where zero points are floats."""
    assert zero is not None
    step, middle = scale, zero.float()
    kept_step, kept_middle = step, middle
    least = torch.full_like(step, torch.inf)
    counts, beta = present.sum(-1).expand_as(step), how.beta
    for _ in range(how.iterations + 1):
        codes = torch.round(weight * (1 / step)[..., None] + middle[..., None])
        codes = codes.clamp(grid.element.lo, grid.element.hi) * present
        rest = (weight - (codes - middle[..., None]) * step[..., None]) * present
        size = rest.abs()
        error = size.pow(how.norm).sum(-1)
        better = error < BETTER * least
        least = torch.where(better, error, least)
        kept_step, kept_middle = torch.where(better, step, kept_step), torch.where(better, middle, kept_middle)
        shrunk = (size - size.clamp(min=1e-30).pow(how.norm - 1) / beta).clamp(min=0)
        target = weight - torch.sign(rest) * shrunk
        first, total = codes.sum(-1), target.sum(-1)
        spread = (codes * codes).sum(-1) - first * first / counts
        together = (target * codes).sum(-1) - first * total / counts
        step = _stored(together, torch.where(together > 0, spread, 0.0), step)
        middle = _as_half((first - total / step) / counts)
        beta *= how.kappa
    ours, plainly = (
        _stored_error(weight, s, z, grid, how.norm, present) for s, z in ((kept_step, kept_middle), (scale, zero))
    )
    better = torch.isfinite(scale) & (ours < BETTER * plainly)
    return torch.where(better, kept_step, scale), torch.where(better, kept_middle.half(), zero)


def _as_half(zero: Tensor) -> Tensor:
    """A zero point as float16 stores it; what is no normal float16 becomes 0."""
    largest = torch.finfo(torch.float16).max
    found = zero.clamp(-largest, largest).half().float()
    return torch.where(found.abs() < torch.finfo(torch.float16).tiny, 0.0, found)


def _least_squares(
    target: Tensor,
    codes: Tensor,
    counts: Tensor,
    step: Tensor,
    window: Tensor,
    symmetric: bool,
    lowest_zero: int,
    largest: float,
) -> tuple[Tensor, Tensor]:
    """The step and the zero point of least squares, target ~ step * (codes + a whole shift); the step as float16."""
    inner, square = (target * codes).sum(-1), (codes * codes).sum(-1)
    if symmetric:
        return _stored(inner, square, step), window
    first, total = codes.sum(-1), target.sum(-1)
    spread = square - first * first / counts
    slope = (inner - first * total / counts) / spread
    usable = (spread > 0) & (slope > 0)
    shift = torch.where(usable, (total - slope * first) / (counts * slope), 0.0).clamp(-largest, largest)
    best_step, best_window = step, window
    most = torch.full_like(step, -torch.inf)
    for whole in (torch.floor(shift), torch.ceil(shift)):
        moved = (window - whole).clamp(lowest_zero, largest)
        change = window - moved  # what the window leaves of the shift
        product = inner + change * total
        power = square + 2 * change * first + counts * change * change
        explained = torch.where((power > 0) & (product > 0), product * product / power, -torch.inf)
        better = explained > most
        most = torch.where(better, explained, most)
        best_step = torch.where(better, _stored(product, power, step), best_step)
        best_window = torch.where(better, moved, best_window)
    return best_step, best_window


def _stored(product: Tensor, power: Tensor, step: Tensor) -> Tensor:
    """product / power as a positive float16, in float32; the step as it was where that is none."""
    usable = (power > 0) & (product > 0)
    found = torch.where(usable, product / power, step).clamp(max=torch.finfo(torch.float16).max).half()
    return found.clamp(min=torch.tensor(SMALLEST_SCALE, dtype=torch.float16).item()).float()


def _stored_error(
    weight: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, norm: float, present: Tensor | None = None
) -> Tensor:
    """sum |w - decoded|^norm of blocks with codes as they will be stored, in float64."""
    shift = 0.0 if zero is None else zero.float()[..., None]
    codes = _coded(weight, scale, zero, grid) - shift
    lost = (weight.double() - (codes * scale[..., None]).double()).abs().pow(norm)
    return (lost if present is None else lost * present).sum(-1)


def _coded(weight: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """The codes of blocks, as `encode_scaled` finds them, in float32."""
    scaled, shift = weight / scale[..., None], 0.0 if zero is None else zero.float()[..., None]
    made = torch.round(scaled + shift) if grid.has_float_zeros else torch.round(scaled) + shift
    return made.clamp(grid.element.lo, grid.element.hi)
