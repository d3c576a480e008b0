"""Learned rounding: its gradients are autograd's of a slow obvious text, and its kernels are the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ops.cases import KINDS, SHAPES, grids, weights
from roundel.ops.encode import encode, encode_reference
from roundel.ops.fit import SMALLEST_SCALE
from roundel.ops.learned_descent import FIRST, SECOND, descend, gradients, remember
from roundel.ops.learned_rounding import (
    LARGEST_FACTOR,
    LARGEST_NARROW,
    Learned,
    _stored,
    begin,
    finish,
    fit_range,
    round_matrix,
    round_matrix_reference,
)
from roundel.scheme import Grid
from roundel.tensor import QuantizedTensor, plain


def learned_of(weight: Tensor, grid: Grid, seed: int = 0) -> Learned:
    """Somewhere on the way: shifts within a step, factors within a half."""
    generator = torch.Generator().manual_seed(seed)
    found = begin(weight.float().contiguous(), encode_reference(weight, grid))
    found.shift.copy_(torch.rand(weight.shape, generator=generator) * 1.6 - 0.8)
    for factor in (found.low, found.high):
        if factor is not None:
            factor.copy_(torch.rand(factor.shape, generator=generator) + 0.5)
    return found


def copy_of(learned: Learned) -> Learned:
    low = None if learned.low is None else learned.low.clone()
    return replace(learned, shift=learned.shift.clone(), low=low, high=learned.high.clone())


class _Through(torch.autograd.Function):
    """`inner` forward, the identity backward."""

    @staticmethod
    def forward(context: object, x: Tensor, inner: object) -> Tensor:  # type: ignore[override]
        return inner(x)  # type: ignore[operator,no-any-return]

    @staticmethod
    def backward(context: object, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def slow(learned: Learned, shift: Tensor, low: Tensor | None, high: Tensor) -> Tensor:
    """The rounded weights by autograd alone: column by column of a block, straight through every rounding."""
    grid, width = learned.grid, learned.weight.shape[1]

    def through(x: Tensor, inner: object) -> Tensor:
        return _Through.apply(x, inner)  # type: ignore[no-any-return,no-untyped-call]

    pieces = []
    for block in range(high.shape[1]):
        at = slice(block * learned.columns, min(width, (block + 1) * learned.columns))
        weight, v = learned.weight[:, at], shift[:, at]
        zero: Tensor | float = 0.0
        top = (learned.upper * high)[:, block : block + 1]
        if grid.scale == "E8M0":
            largest = 2.0 if grid.element.name == "e2m1" else 8.0
            exponent = through(torch.log2(top), torch.floor) - largest
            scale = 2.0**exponent
        elif low is None or learned.lower is None:
            scale = through(top, lambda x: x.half().float())
        else:
            bottom = (learned.lower * low)[:, block : block + 1]
            scale = through((top - bottom) / grid.element.hi, lambda x: x.half().float())
            zero = through(-bottom / scale, torch.round).clamp(grid.lowest_zero, grid.element.hi)
        steps = weight / scale + v
        if grid.scale == "E8M0":
            pieces.append(through(steps.clamp(grid.element.lo, grid.element.hi), lambda x: nearest(x, grid)) * scale)
        else:
            codes = (through(steps, torch.round) + zero).clamp(grid.element.lo, grid.element.hi)
            pieces.append((codes - zero) * scale)
    return torch.cat(pieces, dim=1)


def nearest(x: Tensor, grid: Grid) -> Tensor:
    """The element's value nearest to x, by looking at all of them; ties are not met."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    table = torch.tensor(grid.element.values) if grid.element.values else values[values.isfinite()]
    return table[(x[..., None] - table).abs().argmin(-1)]


@pytest.mark.parametrize("name", grids())
def test_gradients_are_those_of_autograd(name: str) -> None:
    for shape in ((5, 96), (3, 100)):
        learned = learned_of(weights("normal", shape, torch.float32) + 0.01, grids()[name])
        shift, high = learned.shift.clone().requires_grad_(), learned.high.clone().requires_grad_()
        low = None if learned.low is None else learned.low.clone().requires_grad_()
        rounded, found = slow(learned, shift, low, high), fit_range(learned)
        assert torch.equal(rounded, round_matrix(learned, found))
        slope = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        (rounded * slope).sum().backward()  # type: ignore[no-untyped-call]
        ours = gradients(learned, found, slope)
        torch.testing.assert_close(ours.shift, shift.grad, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(ours.high, high.grad, rtol=1e-4, atol=1e-5)
        if low is not None:
            torch.testing.assert_close(ours.low, low.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", grids())
def test_the_start_is_plain_rounding_and_the_end_decodes_to_what_was_run(name: str) -> None:
    for shape in SHAPES:
        for kind in KINDS:
            weight = weights(kind, shape, torch.float32)
            plainly = encode(weight, grids()[name])
            learned = begin(weight, plainly)
            assert torch.equal(round_matrix(learned, fit_range(learned)), plainly.decode())
            assert torch.equal(finish(learned).decode(), plainly.decode())
            learned = learned_of(weight, grids()[name])
            found = finish(learned)
            assert torch.equal(round_matrix(learned, fit_range(learned)), found.decode())
            if found.zero is not None:
                assert int(found.zero.min()) >= grids()[name].lowest_zero


@pytest.mark.parametrize("name", grids())
def test_kernels_equal_their_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from roundel.ops.numba.learned_rounding import descend_kernel, round_kernel

    for shape in SHAPES:
        for kind in KINDS:
            learned = learned_of(weights(kind, shape, torch.float32), grids()[name])
            found = fit_range(learned)
            assert torch.equal(round_kernel(learned, found, torch.empty(shape)), round_matrix_reference(learned, found))
            slope = torch.randn(shape, generator=torch.Generator().manual_seed(2))
            slope[slope.abs() < 0.1] = 0  # experts' weights that saw nothing
            other, moved = copy_of(learned), copy_of(learned)
            monkeypatch.setenv("ROUNDEL_REFERENCE", "1")
            descend(other, found, slope, rate=0.01, range_rate=0.02)
            monkeypatch.setenv("ROUNDEL_REFERENCE", "0")
            descend(moved, found, slope, rate=0.01, range_rate=0.02)
            assert torch.equal(moved.shift, other.shift)
            # Sums are taken in another order: where one is nearly 0, so may its sign be another.
            steps = (learned.weight / spread(found.scale, learned)).abs() + 2.0**learned.grid.element.bits
            bound = (slope.abs() * steps).sum(-1).max() * 1e-5
            exact = by_scale_of(learned, slope)
            by_scale, _ = descend_kernel(copy_of(learned), found, slope, 0.0)
            assert (by_scale - exact).abs().max() <= bound
            memory, others = remember(learned), remember(learned)
            for step in (1, 2):
                monkeypatch.setenv("ROUNDEL_REFERENCE", "1")
                descend(other, found, slope, rate=0.01, range_rate=0.0, memory=others, step=step)
                monkeypatch.setenv("ROUNDEL_REFERENCE", "0")
                descend(moved, found, slope, rate=0.01, range_rate=0.0, memory=memory, step=step)
                torch.testing.assert_close(moved.shift, other.shift, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(memory.shift.second, others.shift.second, rtol=1e-5, atol=1e-30)
            sure = (exact.abs() > 2 * bound) if learned.low is None else torch.zeros_like(exact, dtype=torch.bool)
            assert torch.equal(moved.high[sure], other.high[sure])


def spread(per_block: Tensor, learned: Learned) -> Tensor:
    return per_block.repeat_interleave(learned.columns, dim=1)[:, : learned.weight.shape[1]]


def by_scale_of(learned: Learned, slope: Tensor) -> Tensor:
    """sum of slope * (nearest - inside * ratio) in float64."""
    found = fit_range(learned)
    scale = spread(found.scale, learned)
    value = round_matrix_reference(learned, found) / scale
    ratio = learned.weight / scale
    inside = (ratio + learned.shift - value).abs() <= 0.5
    if learned.grid.scale == "E8M0":
        inside = (ratio + learned.shift).abs() <= learned.grid.element.hi
    each = (slope * (value - inside * ratio)).double()
    return torch.stack([part.sum(-1) for part in each.split(learned.columns, dim=1)], dim=1).float()


def test_rows_may_be_shared_among_threads() -> None:
    from roundel.ops.numba.rows import WEIGHTS_A_THREAD

    learned = learned_of(torch.randn(1030, 520, generator=torch.Generator().manual_seed(0)), grids()["W4A16_ASYM"])
    slope, found = torch.randn(1030, 520), fit_range(learned)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert 1030 * 520 // WEIGHTS_A_THREAD >= 2
            moved = copy_of(learned)
            descend(moved, found, slope, rate=0.01, range_rate=0.01)
            results.append((moved.shift, moved.high, moved.low, round_matrix(learned, found)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_factors_stay_in_bounds_and_scales_stay_scales() -> None:
    for name, grid in grids().items():
        learned = learned_of(weights("normal", (4, 96), torch.float32), grid)
        for sign in (1.0, -1.0):
            for _ in range(4):
                before = fit_range(learned)
                descend(learned, before, sign * torch.ones(4, 96), rate=0.5, range_rate=1.0)
                assert bool((learned.high >= 0).all()) and bool((learned.high <= LARGEST_FACTOR).all()), name
                finished = finish(learned)
                assert bool(torch.isfinite(plain(finished.scale)).all()) and bool((plain(finished.scale) != 0).all())
                assert torch.equal(finished.decode(), round_matrix(learned, fit_range(learned)))


def test_any_start_can_be_gone_on_from() -> None:
    """Half the scale of plain rounding, other zero points, another exponent: learning begins at that."""
    weight = weights("normal", (4, 96), torch.float32)
    for name, grid in grids().items():
        given = encode(weight, grid)
        if grid.scale == "E8M0":
            scale = (given.scale.view(torch.uint8) - 1).view(torch.float8_e8m0fnu)  # type: ignore[union-attr]
            start = QuantizedTensor(grid=grid, codes=given.codes, scale=scale)
        else:
            zero = None if given.zero is None else (given.zero + 1).clamp(max=int(grid.element.hi))
            start = QuantizedTensor(grid=grid, codes=given.codes, scale=plain(given.scale).half() / 2, zero=zero)
        found = finish(begin(weight, start))
        assert torch.equal(plain(found.scale), plain(start.scale)), name
        if start.zero is not None and found.zero is not None:
            assert torch.equal(found.zero, start.zero), name


def test_adam_is_torchs() -> None:
    """Beside torch.optim.Adam with the same betas, on a matrix whose gradients are given."""
    grid = grids()["W8A16"]
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    learned = begin(weight, encode(weight, grid))
    memory, expected = remember(learned), torch.zeros_like(weight, requires_grad=True)
    optimizer = torch.optim.Adam([expected], lr=0.01, betas=(FIRST, SECOND), eps=1e-30)
    for step in range(1, 6):
        slope = torch.randn(4, 128, generator=torch.Generator().manual_seed(step))
        found = fit_range(learned)
        expected.grad = gradients(learned, found, slope).shift
        descend(learned, found, slope, rate=0.01, range_rate=0.0, memory=memory, step=step)
        optimizer.step()
        torch.testing.assert_close(learned.shift, expected.detach(), rtol=1e-5, atol=1e-7)


def test_narrow_scales_are_numbers_of_both_dtypes() -> None:
    scale = torch.logspace(-7, 6, 20001)
    both = torch.cat([scale, -scale])
    found = _stored(both, narrow=True)
    assert torch.equal(found, found.half().float())
    assert torch.equal(found, found.bfloat16().float())
    inside = both.abs().clamp(SMALLEST_SCALE, LARGEST_NARROW) == both.abs()
    assert float(((found - both).abs() / both.abs())[inside].max()) <= 2**-8
    assert torch.equal(_stored(-both, narrow=True), -found)
