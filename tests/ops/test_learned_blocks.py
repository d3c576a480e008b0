"""Learned rounding on ggml's block types: gradients are autograd's of a slow text, kernels and stored numbers agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from roundel.ops.encode import encode
from roundel.ops.learned_descent import descend, gradients
from roundel.ops.learned_rounding import (
    LARGEST_FACTOR,
    Learned,
    begin,
    finish,
    fit_range,
    round_matrix,
    round_matrix_reference,
)
from roundel.scheme import BLOCK_GRIDS, Grid

TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def matrix(seed: int = 0) -> Tensor:
    weight = 0.05 * torch.randn(6, 512, generator=torch.Generator().manual_seed(seed)) + 0.004
    weight[1, :256] = 0.0
    weight[2, 40:72] = 0.0
    return weight


def learned_of(name: str) -> Learned:
    """Somewhere on the way."""
    generator, weight = torch.Generator().manual_seed(3), matrix()
    found = begin(weight, encode(weight, BLOCK_GRIDS[name]))
    found.shift.copy_(torch.rand(weight.shape, generator=generator) * 1.6 - 0.8)
    for factor in (found.low, found.high):
        if factor is not None:
            factor.copy_(torch.rand(factor.shape, generator=generator) * 0.6 + 0.7)
    return found


class _Through(torch.autograd.Function):
    """`inner` forward, the identity backward."""

    @staticmethod
    def forward(context: object, x: Tensor, inner: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        return inner(x)

    @staticmethod
    def backward(context: object, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def through(x: Tensor, inner: Callable[[Tensor], Tensor]) -> Tensor:
    return _Through.apply(x, inner)  # type: ignore[no-any-return,no-untyped-call]


def slow(learned: Learned, shift: Tensor, low: Tensor | None, high: Tensor) -> Tensor:
    """The rounded weights by autograd alone; scales and bases as they were found, straight through."""
    grid, n = learned.grid, learned.columns
    found = fit_range(learned)
    scale = through(learned.upper * high, lambda _: found.scale).repeat_interleave(n, 1)
    base: Tensor | float = 0.0
    if low is not None and learned.lower is not None and found.base is not None:
        fixed = found.base
        base = through(learned.lower * low, lambda _: fixed).repeat_interleave(n, 1)
    steps = through((learned.weight - base) / scale + shift, torch.round)
    return steps.clamp(grid.element.lo, grid.element.hi) * scale + base


@pytest.mark.parametrize("name", TYPES)
def test_gradients_are_those_of_autograd(name: str) -> None:
    learned = learned_of(name)
    shift, high = learned.shift.clone().requires_grad_(), learned.high.clone().requires_grad_()
    low = None if learned.low is None else learned.low.clone().requires_grad_()
    rounded = slow(learned, shift, low, high)
    found = fit_range(learned)
    assert torch.equal(rounded, round_matrix(learned, found))
    slope = torch.randn(learned.weight.shape, generator=torch.Generator().manual_seed(1))
    (rounded * slope).sum().backward()  # type: ignore[no-untyped-call]
    ours = gradients(learned, found, slope)
    torch.testing.assert_close(ours.shift, shift.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.high, high.grad, rtol=1e-4, atol=1e-5)
    assert (ours.low is None) == (low is None)
    if low is not None and ours.low is not None:
        torch.testing.assert_close(ours.low, low.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TYPES)
def test_what_is_learned_is_what_is_stored(name: str) -> None:
    learned = learned_of(name)
    rounded = round_matrix(learned, fit_range(learned))
    assert torch.equal(finish(learned).decode(), rounded)
    assert torch.equal(rounded, round_matrix_reference(learned, fit_range(learned)))
    assert bool(torch.isfinite(rounded).all())


@pytest.mark.parametrize("name", TYPES)
def test_learning_begins_at_the_start(name: str) -> None:
    weight, grid = matrix(), BLOCK_GRIDS[name]
    start = encode(weight, grid)
    begun = finish(begin(weight, start)).decode()
    worse = (begun - weight).square().sum() > (start.decode() - weight).square().sum() * (1 + 1e-5)
    assert not worse, "codes are the nearest on the scales of the start"


@pytest.mark.parametrize("name", TYPES)
def test_kernels_step_as_the_definition_does(name: str) -> None:
    learned = learned_of(name)
    found = fit_range(learned)
    slope = torch.randn(learned.weight.shape, generator=torch.Generator().manual_seed(2))
    slow_one = replace(
        learned,
        shift=learned.shift.clone(),
        high=learned.high.clone(),
        low=None if learned.low is None else learned.low.clone(),
    )
    assert learned.still is not None and learned.still.any()
    moving = ~learned.still.repeat_interleave(learned.columns, 1)[:, : slope.shape[1]]
    by = gradients(slow_one, found, slope * moving)
    slow_one.shift.sub_(0.01 * by.shift.sign())
    descend(learned, found, slope, rate=0.01, range_rate=0.01)
    assert torch.equal(learned.shift, slow_one.shift)
    clear = by.high.abs() > 1e-4
    expected = (slow_one.high - 0.01 * by.high.sign()).clamp(0, LARGEST_FACTOR)
    assert torch.equal(learned.high[clear], expected[clear])


def grids_with_levels() -> list[str]:
    return [name for name in TYPES if isinstance(BLOCK_GRIDS[name].scale, Grid)]


@pytest.mark.parametrize("name", grids_with_levels())
def test_what_a_super_block_shares_stays(name: str) -> None:
    weight = matrix()
    start = encode(weight, BLOCK_GRIDS[name])
    found = finish(learned_of(name))
    assert not isinstance(start.scale, Tensor) and not isinstance(found.scale, Tensor)
    shared, kept = start.scale.scale, found.scale.scale
    assert isinstance(shared, Tensor) and isinstance(kept, Tensor)
    assert torch.equal(torch.where(shared == 0, torch.tensor(2.0**-24).half(), shared), kept)
