"""Rounding a matrix column by column, each column answering the errors of those before it. Definitions.

With H = U D U^T (`hessian.factorize`), rounding W to W' costs  sum over columns j of  D_j * |t_j - w'_j|^2  of output
error, where  t_j = w_j + sum over i < j of (w_i - w'_i) * U_ij;  so w'_j is t_j, rounded. This is GPTQ (Frantar et al.
2022, arXiv:2210.17323) in the form of QuIP's LDLQ (Chee et al. 2023, arXiv:2307.13304, theorem 6).

Scales are fitted when a group's turn comes, to targets that hold the errors of *all* columns before it, whatever the
size of blocks. And they are searched: a trial scale is judged by rounding the group with it, feedback included, so by
the sum above itself. The literature fits to the range, or to each weight by itself as if the others did not answer.

Matrices are [in, rows], columns of the weight in rounding order; rows of the weight do not know of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from roundel.ops.column_order import Arrangement, Span
from roundel.ops.fit import fit_asymmetric, fit_power_of_two, fit_symmetric
from roundel.ops.hessian import Factors
from roundel.ops.minifloat import decode_e8m0, round_e2m1, round_e4m3
from roundel.scheme import Grid

__all__ = ["MINIFLOATS", "Scales", "nearest", "round_block", "round_columns", "static_scales", "trial_losses"]

PIECE = 128  # columns rounded between two matrix products, at most
MINIFLOATS = {"e2m1": (1, 0), "e4m3": (3, -6)}  # fraction bits, exponent of the smallest normal number
ROUNDS = 2  # of the search for scales, after the first
NARROWEST = {2: 0.4, 3: 0.5, 4: 0.6, 5: 0.7, 6: 0.8, 7: 0.88, 8: 0.92}  # share of the range worth trying, by bits


@dataclass(frozen=True, kw_only=True)
class Scales:
    """The scale and the lowest level (code minus zero point) of each group, [groups, rows] float32.

    Scales are exactly as they are stored. For MX floats the lowest level is minus the element's largest value.
    """

    scale: Tensor
    lowest: Tensor

    def taken(self, groups: Tensor | int) -> Scales:
        """Those of some groups, or trials."""
        at = slice(groups, groups + 1) if isinstance(groups, int) else groups
        return Scales(scale=self.scale[at], lowest=self.lowest[at])

    def chosen(self, index: Tensor) -> Scales:
        """Of trials [trials, rows], each row's own: [1, rows]."""
        at = index[None]
        return Scales(scale=self.scale.gather(0, at), lowest=self.lowest.gather(0, at))


def round_columns(
    weight: Tensor,
    factors: Factors,
    arrangement: Arrangement,
    grid: Grid,
    *,
    fixed: Scales | None = None,
    trials: int,
    block_size: int,
) -> tuple[Tensor, Scales]:
    """Codes [in, rows] as bytes, and the scales of all groups [groups, rows].

    weight      [in, rows] float32, in rounding order; overwritten with the errors w - w'
    fixed       scales of all groups, where they do not wait for their turn
    trials      shares of the range tried in the first round of the search; with 0 the range itself is taken
    block_size  columns that far columns' errors are applied to at once; changes speed, not what is computed
    """
    width, rows = weight.shape
    groups = int(arrangement.group.max()) + 1
    codes = torch.empty((width, rows), dtype=torch.uint8, device=weight.device)
    empty = torch.empty((groups, rows), dtype=torch.float32, device=weight.device)
    scales = fixed or Scales(scale=empty, lowest=empty.clone())
    upper = factors.upper
    for panel in _panels(arrangement.spans or _pieces(0, width), block_size):
        first, last = panel[0][0], panel[-1][1]
        target = torch.addmm(weight[first:last], upper[:first, first:last].T, weight[:first])
        for start, end, group in panel:
            here = target[start - first : end - first]
            here.addmm_(upper[first:start, start:end].T, weight[first:start])
            if fixed is None:
                found = _searched(
                    _answered(here, weight[start:end], upper[start:end, start:end]), factors, start, grid, trials
                )
                scales.scale[group], scales.lowest[group] = found.scale[0], found.lowest[0]
            for begin, stop, _ in _pieces(start, end):
                piece = here[begin - start : stop - start]
                piece.addmm_(upper[start:begin, begin:stop].T, weight[start:begin])
                which = arrangement.group[begin:stop]
                mine = scales if arrangement.spans is None else scales.taken(group)
                which = which if arrangement.spans is None else torch.zeros_like(which)
                levels = round_block(piece, weight[begin:stop], _coupling(upper, begin, stop), mine, which, grid)
                codes[begin:stop] = _codes(levels, mine.lowest[which], grid)
    return codes, scales


def static_scales(weight: Tensor, strength: Tensor, columns: int, grid: Grid, trials: int) -> Scales:
    """Scales of all groups before anything is rounded: each weight's error costs what it costs alone.

    weight     [in, rows], in the matrix' own order
    strength   [in], in that order too
    """
    alone = torch.zeros((PIECE, PIECE), dtype=torch.float32, device=weight.device)
    found = []
    for start in range(0, len(weight), columns):
        group, counted = weight[start : start + columns], strength[start : start + columns]

        def losses(tried: Scales, group: Tensor = group, counted: Tensor = counted) -> Tensor:
            total = torch.zeros_like(tried.scale)
            for begin, stop, _ in _pieces(0, len(group)):
                piece, coupling = group[begin:stop], alone[: stop - begin, : stop - begin]
                total += trial_losses(piece, coupling, counted[begin:stop], tried, grid)
            return total

        found.append(_search(group, losses, grid, trials))
    return Scales(scale=torch.cat([f.scale for f in found]), lowest=torch.cat([f.lowest for f in found]))


def _answered(target: Tensor, weight: Tensor, upper: Tensor) -> Tensor:
    """Where the columns of a group cost least, given the errors of all columns before it [columns, rows].

    A target t_j holds what is fed to column j if the columns between are at their targets too; if instead they are
    where they cost least, it is  w + (t - w) U^-1.
    """
    moved: Tensor = torch.linalg.solve_triangular(upper.T, target - weight, upper=False, unitriangular=True)
    return moved.add_(weight)


def _searched(values: Tensor, factors: Factors, start: int, grid: Grid, trials: int) -> Scales:
    """The scale [1, rows] of the group whose first column is at `start`, its pieces' own feedback included."""

    def losses(tried: Scales) -> Tensor:
        total = torch.zeros_like(tried.scale)
        for begin, stop, _ in _pieces(0, len(values)):
            coupling = _coupling(factors.upper, start + begin, start + stop)
            counted = factors.strength[start + begin : start + stop]
            total += trial_losses(values[begin:stop], coupling, counted, tried, grid)
        return total

    return _search(values, losses, grid, trials)


def _search(values: Tensor, losses: Callable[[Scales], Tensor], grid: Grid, trials: int) -> Scales:
    """The best scale [1, rows] for a group of values [columns, rows]; what plain rounding takes is among the trials.

    First shares of the range, then what lies around each row's best, twice as near each time. A symmetric grid has one
    more code below zero than above, so its scale is tried with both signs.
    """
    low, high = values.amin(0).clamp(max=0), values.amax(0).clamp(min=0)
    if grid.scale == "E8M0":
        tried = _exponents(low, high, grid, (0, 1, -1) if trials else (0,))
        return tried.chosen(losses(tried).argmin(0)) if trials else tried
    if not trials:
        return _fitted(low[None], high[None], grid)
    narrowest = NARROWEST[grid.element.bits]
    shares = torch.linspace(1.0, narrowest, trials, dtype=torch.float32, device=low.device)[:, None]
    around: Sequence[tuple[float, float]]
    if grid.symmetric:
        extreme, none = torch.maximum(-low, high) * shares, torch.zeros_like(low) * shares
        bottoms, tops = torch.cat((-extreme, none)), torch.cat((none, extreme))
        around = ((-1, -1), (1, 1))
    else:
        bottoms, tops = low * shares, high * shares
        around = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0)]
    best = _fitted(bottoms, tops, grid)
    least, at = losses(best).min(0)
    best, bottom, top = best.chosen(at), bottoms.gather(0, at[None]), tops.gather(0, at[None])
    step = (1 - narrowest) / max(1, trials - 1)
    for _ in range(ROUNDS):
        step /= 2
        bottoms = torch.cat([bottom * (1 + a * step) for a, _ in around])
        tops = torch.cat([top * (1 + b * step) for _, b in around])
        tried = _fitted(bottoms, tops, grid)
        found, at = losses(tried).min(0)
        at, better = at[None], (found < least)[None]
        bottom = torch.where(better, bottoms.gather(0, at), bottom)
        top = torch.where(better, tops.gather(0, at), top)
        best = Scales(
            scale=torch.where(better, tried.scale.gather(0, at), best.scale),
            lowest=torch.where(better, tried.lowest.gather(0, at), best.lowest),
        )
        least = torch.minimum(found, least)
    return best


def _fitted(low: Tensor, high: Tensor, grid: Grid) -> Scales:
    """Scales of integers that reach from low to high, any shape, as `ops.fit` has them."""
    ends = torch.stack((low, high), dim=-1)
    if grid.symmetric:
        scale = fit_symmetric(ends, grid.element.bits).float()
        return Scales(scale=scale, lowest=torch.full_like(scale, grid.element.lo))
    stored, zero = fit_asymmetric(ends, grid.element.bits, grid.lowest_zero)
    return Scales(scale=stored.float(), lowest=-zero.float())


def _exponents(low: Tensor, high: Tensor, grid: Grid, changes: Sequence[int]) -> Scales:
    """Scales of MX floats: the power of two that `ops.fit` takes, and its neighbours."""
    exponents = fit_power_of_two(torch.stack((low, high), dim=-1), grid).int()
    tried = torch.stack([(exponents + change).clamp(0, 254) for change in changes])
    scale = decode_e8m0(tried.to(torch.uint8))
    return Scales(scale=scale, lowest=torch.full_like(scale, grid.element.lo))


def trial_losses(values: Tensor, coupling: Tensor, strength: Tensor, tried: Scales, grid: Grid) -> Tensor:
    """What rounding some columns costs with each of several scales: sum over columns of strength * |t - w'|^2.

    values     [columns, rows]: where they cost least, given all earlier errors
    coupling   [columns, columns]: below its diagonal, at [j, i], what of column i's error is fed to column j
    tried      [trials, rows]
    returns    [trials, rows]
    """
    from roundel.ops import use_kernels

    if use_kernels() and values.device.type == "cpu":
        from roundel.ops.numba.feedback import trial_losses_by_kernel

        return trial_losses_by_kernel(values, coupling, strength, tried, grid)
    return trial_losses_reference(values, coupling, strength, tried, grid)


def trial_losses_reference(values: Tensor, coupling: Tensor, strength: Tensor, tried: Scales, grid: Grid) -> Tensor:
    """`trial_losses` in plain torch."""
    which = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    losses = []
    for trial in range(len(tried.scale)):
        scales, error = tried.taken(trial), values.clone()
        levels = round_block_reference(values, error, coupling, scales, which, grid)
        fed = values + coupling.tril(-1) @ error
        losses.append((strength[:, None] * (fed - levels * scales.scale).square()).sum(0))
    return torch.stack(losses)


def round_block(target: Tensor, weight: Tensor, coupling: Tensor, scales: Scales, which: Tensor, grid: Grid) -> Tensor:
    """Round some columns one after the other. Returns levels [columns, rows]: codes minus zero points, as float32.

    target          [columns, rows], fed with the errors of all earlier columns
    weight          [columns, rows], overwritten with the errors w - w'
    coupling        as `trial_losses` takes it
    scales, which   [n, rows], and which of the n each column takes
    """
    from roundel.ops import use_kernels

    if use_kernels() and target.device.type == "cpu":
        from roundel.ops.numba.feedback import round_block_by_kernel

        return round_block_by_kernel(target, weight, coupling, scales, which, grid)
    return round_block_reference(target, weight, coupling, scales, which, grid)


def round_block_reference(
    target: Tensor, weight: Tensor, coupling: Tensor, scales: Scales, which: Tensor, grid: Grid
) -> Tensor:
    """`round_block` in plain torch: the text of the algorithm."""
    levels = torch.empty_like(target)
    for column, group in enumerate(which.tolist()):
        fed = target[column] + coupling[column, :column] @ weight[:column]
        scale = scales.scale[group]
        levels[column] = nearest(fed / scale, scales.lowest[group], grid)
        weight[column] -= levels[column] * scale
    return levels


def nearest(values: Tensor, lowest: Tensor, grid: Grid) -> Tensor:
    """The level closest to each value, half to even: whole numbers from `lowest` on, or values of a small float."""
    element = grid.element
    if element.is_integer:
        return torch.minimum(torch.maximum(torch.round(values), lowest), lowest + (element.hi - element.lo))
    fraction, least = MINIFLOATS[element.name]
    bounded = values.clamp(element.lo, element.hi)
    exponent = (torch.frexp(bounded).exponent - 1).clamp(min=least) - fraction
    step = torch.ldexp(torch.ones_like(bounded), exponent)
    return torch.round(bounded / step) * step


def _codes(levels: Tensor, lowest: Tensor, grid: Grid) -> Tensor:
    """Levels -> the bytes of their codes."""
    if grid.element.is_integer:
        return levels.to(torch.int8).view(torch.uint8) if grid.symmetric else (levels - lowest).to(torch.uint8)
    return round_e2m1(levels) if grid.element.name == "e2m1" else round_e4m3(levels).view(torch.uint8)


def _coupling(upper: Tensor, start: int, end: int) -> Tensor:
    return upper[start:end, start:end].T.contiguous()


def _pieces(start: int, end: int) -> tuple[Span, ...]:
    return tuple((begin, min(begin + PIECE, end), 0) for begin in range(start, end, PIECE))


def _panels(spans: Sequence[Span], block_size: int) -> list[list[Span]]:
    """Spans in order, as many together as fit a block; at least one."""
    panels: list[list[Span]] = []
    for span in spans:
        if panels and span[1] - panels[-1][0][0] <= block_size:
            panels[-1].append(span)
        else:
            panels.append([span])
    return panels
