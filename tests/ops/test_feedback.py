"""Rounding with feedback: blocks, factors and kernels do what GPTQ's paper says, one column at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from roundel.ops import feedback
from roundel.ops.column_order import Arrangement, arrange
from roundel.ops.encode import encode
from roundel.ops.feedback import (
    Scales,
    nearest,
    round_block_reference,
    round_columns,
    static_scales,
    trial_losses_reference,
)
from roundel.ops.fit import fit_asymmetric, fit_power_of_two, fit_symmetric
from roundel.ops.hessian import Factors, factorize, proxy_loss
from roundel.ops.minifloat import decode_e8m0, round_e2m1, round_e4m3
from roundel.ops.numba.feedback import round_block_by_kernel, trial_losses_by_kernel
from roundel.scheme import Grid, Scheme

SCHEMES = ("W2A16G32", "W3A16G32_ASYM", "W4A16G16", "W4A16G-1", "W5A16G48_ASYM", "W8A16G64", "MXFP4", "MXFP8")
USUAL = {"trials": 4, "block_size": 128}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def problem(width: int, rows: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix [rows, width] and a Hessian of correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    sizes = torch.exp(torch.randn(width, generator=generator))
    x = torch.randn(4 * width, width, generator=generator) @ mixing * sizes
    return torch.randn(rows, width, generator=generator) * 0.05, x.T @ x / len(x)


def fitted(group: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The scale and lowest level of [rows, n] weights, by range."""
    if grid.scale == "E8M0":
        scale = decode_e8m0(fit_power_of_two(group, grid)).double()
        return scale, torch.full_like(scale, grid.element.lo)
    if grid.symmetric:
        scale = fit_symmetric(group, grid.element.bits).double()
        return scale, torch.full_like(scale, grid.element.lo)
    stored, zero = fit_asymmetric(group, grid.element.bits, grid.lowest_zero)
    return stored.double(), -zero.double()


def slow_gptq(weight: Tensor, hessian: Tensor, order: list[int], grid: Grid, damping: float) -> Tensor:
    """Algorithm 1 of the paper without its speedups, in float64: the inverse of the Hessian of the columns that are
    left, made anew for each column; the scale of a group fitted when its first column is reached. -> [rows, width]"""
    current = weight.double().clone()
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian)).double()
    columns = grid.block_of((len(weight), len(hessian)))[1]
    decoded = torch.zeros_like(current)
    scales: dict[int, tuple[Tensor, Tensor]] = {}
    for place, column in enumerate(order):
        group = column // columns
        if group not in scales:
            scales[group] = fitted(current[:, group * columns : (group + 1) * columns].float(), grid)
        scale, lowest = scales[group]
        level = nearest((current[:, column] / scale).float(), lowest.float(), grid)
        decoded[:, column] = level.double() * scale
        left = order[place:]
        inverse = torch.linalg.inv(damped[left][:, left])
        error = (current[:, column] - decoded[:, column]) / inverse[0, 0]
        current[:, left] -= error[:, None] * inverse[0][None]
    return decoded


def rounded(
    weight: Tensor, factors: Factors, arrangement: Arrangement, grid: Grid, **options: int
) -> tuple[Tensor, Tensor, Scales]:
    """(what is decoded [rows, width], errors in rounding order, scales) of `round_columns`."""
    ordered, told = weight[:, arrangement.order].T.contiguous(), USUAL | options
    fixed = None
    if arrangement.static:
        places = arrangement.order.argsort()
        columns = grid.block_of((weight.shape[0], weight.shape[1]))[1]
        fixed = static_scales(weight.T.contiguous(), factors.strength[places], columns, grid, told["trials"])
    _, scales = round_columns(ordered, factors, arrangement, grid, fixed=fixed, **told)
    decoded = torch.empty_like(weight)
    decoded[:, arrangement.order] = weight[:, arrangement.order] - ordered.T
    return decoded, ordered, scales


def setting(name: str, width: int, **options: bool) -> tuple[Grid, Tensor, Tensor, Arrangement, Factors]:
    grid = Scheme.parse(name).weight
    weight, hessian = problem(width)
    arrangement = arrange(hessian.diagonal(), grid.block_of((24, width))[1], **options)
    factors = factorize(hessian.clone(), arrangement.order, damping=0.01, step=0.01)
    assert factors is not None
    return grid, weight, hessian, arrangement, factors


@pytest.mark.parametrize("group_order", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_it_is_the_papers_algorithm(name: str, group_order: bool) -> None:
    """Rounded alike but for values that lie between two levels, where float32 and float64 may differ."""
    grid, weight, hessian, arrangement, factors = setting(name, 160, group_order=group_order)
    decoded, _, _ = rounded(weight, factors, arrangement, grid, trials=0)
    slow = slow_gptq(weight, hessian, arrangement.order.tolist(), grid, 0.01)
    same = (decoded.double() - slow).abs() <= 1e-6 * slow.abs() + 1e-9
    assert same.float().mean() > 0.99
    assert same.all(1).float().mean() > 0.8  # most rows have no such value
    ours, theirs = (float((((weight - q).double() @ hessian.double()) * (weight - q)).sum()) for q in (decoded, slow))
    assert ours == pytest.approx(theirs, rel=5e-3)


@pytest.mark.parametrize("name", ["W3A16G32_ASYM", "W4A16G48", "W4A16G-1", "MXFP4"])
def test_the_size_of_blocks_changes_nothing(name: str) -> None:
    """INC's default of 2048, and its kin, fit scales to weights that miss the feedback of their own block."""
    grid, weight, _, arrangement, factors = setting(name, 320)
    expected, _, scales = rounded(weight, factors, arrangement, grid, block_size=1)
    for block_size in (40, 128, 2048):
        decoded, _, others = rounded(weight, factors, arrangement, grid, block_size=block_size)
        assert (decoded == expected).float().mean() > 0.99
        torch.testing.assert_close(others.scale[:, :2], scales.scale[:, :2], rtol=0.02, atol=0)


def test_scales_know_of_all_earlier_errors() -> None:
    """The scale of every group is fitted to its weights as they are when its turn comes, not as they were (as
    llm-compressor's are), nor without their own block's feedback (as the reference's)."""
    grid, weight, hessian, arrangement, factors = setting("W3A16G32", 128, group_order=False)
    _, _, scales = rounded(weight, factors, arrangement, grid, trials=0, block_size=2048)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(128).double()
    _, errors, _ = rounded(weight, factors, arrangement, grid, trials=0)
    for group in range(1, 4):
        before, here = slice(0, 32 * group), slice(32 * group, 32 * group + 32)
        after = slice(32 * group, 128)
        # The columns that are left take the place that costs least, given the errors of those that are done.
        answer = -torch.linalg.solve(damped[after, after], damped[after, before] @ errors[before].double())
        moved = weight.T[here].double() - answer[:32]
        expected = fit_symmetric(moved.T.float(), 3).float()
        torch.testing.assert_close(scales.scale[group], expected, rtol=2e-3, atol=0)
        untouched = fit_symmetric(weight[:, here], 3).float()
        assert ((scales.scale[group] - untouched).abs() > 0.01 * untouched.abs()).float().mean() > 0.5


@pytest.mark.parametrize(
    "options", [{}, {"static_groups": True}, {"act_order": True}, {"act_order": True, "static_groups": True}]
)
@pytest.mark.parametrize("name", SCHEMES)
def test_errors_and_losses_are_what_they_say(name: str, options: dict[str, bool]) -> None:
    grid, weight, hessian, arrangement, factors = setting(name, 160, **options)
    decoded, errors, scales = rounded(weight, factors, arrangement, grid)
    codes, _ = round_columns(
        weight[:, arrangement.order].T.contiguous(),
        factors,
        arrangement,
        grid,
        fixed=scales if arrangement.static else None,
        **USUAL,
    )
    if grid.element.is_integer:
        levels = codes.view(torch.int8).float() if grid.symmetric else codes.float() + scales.lowest[arrangement.group]
        made = levels * scales.scale[arrangement.group]
        torch.testing.assert_close(made.T, decoded[:, arrangement.order], rtol=1e-5, atol=1e-7)
        assert torch.equal(scales.scale, scales.scale.half().float())  # rounded with what is stored
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(160)
    exact = (((weight - decoded) @ damped) * (weight - decoded)).sum(1).double()
    torch.testing.assert_close(proxy_loss(errors, factors), exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_output_error_down_weight_error_up(name: str) -> None:
    grid, weight, hessian, arrangement, factors = setting(name, 192)
    searched, _, _ = rounded(weight, factors, arrangement, grid)
    plain = encode(weight, grid).decode()

    def output(error: Tensor) -> float:
        return float(((error @ hessian) * error).sum())

    assert output(weight - searched) < output(weight - plain)
    ranged, _, _ = rounded(weight, factors, arrangement, grid, trials=0)
    assert float((weight - ranged).square().sum()) > float((weight - plain).square().sum())
    assert output(weight - searched) < output(weight - ranged) or grid.element.bits == 8


@pytest.mark.parametrize("name", ["W4A16G32", "W2A16G64_ASYM"])
def test_columns_that_saw_nothing_are_rounded_to_nearest(name: str) -> None:
    """They are neither set to zero, as in the reference, nor moved."""
    grid = Scheme.parse(name).weight
    weight, hessian = problem(128)
    dead = [5, 64, 100]
    hessian[dead], hessian[:, dead] = 0, 0
    arrangement = arrange(hessian.diagonal(), grid.block[1])
    factors = factorize(hessian, arrangement.order, damping=0.01, step=0.01)
    assert factors is not None
    decoded, _, scales = rounded(weight, factors, arrangement, grid)
    for column in dead:
        group = column // grid.block[1]
        nearest_level = nearest(weight[:, column] / scales.scale[group], scales.lowest[group], grid)
        torch.testing.assert_close(decoded[:, column], nearest_level * scales.scale[group], rtol=1e-6, atol=1e-8)
        assert (decoded[:, column] != 0).float().mean() > 0.3


def test_groups_of_one_sign_use_their_codes() -> None:
    """The reference's symmetric range of a group without negative weights is half of what its codes take for it."""
    grid = Scheme.parse("W4A16G16").weight
    weight, hessian = problem(64)
    arrangement = arrange(hessian.diagonal(), 16)
    for sign in (1, -1):
        factors = factorize(hessian.clone(), arrangement.order, damping=0.01, step=0.01)
        assert factors is not None
        one_sided = sign * (weight.abs() + 0.02)
        decoded, _, scales = rounded(one_sided, factors, arrangement, grid, trials=0)
        assert float((one_sided - decoded).abs().max()) < 0.35 * float(one_sided.abs().max())
        assert ((scales.scale < 0) == (sign > 0)).float().mean() > 0.9  # eight codes on the side that has weights


def test_static_groups_keep_their_own_ranges_in_any_order() -> None:
    """GPTQModel looks static groups up by place once they are reordered: each gets another group's range."""
    grid = Scheme.parse("W4A16G32_ASYM").weight
    weight, hessian = problem(128)
    weight = weight * torch.tensor([0.1, 1.0, 10.0, 100.0]).repeat_interleave(32)
    for options in ({}, {"act_order": True}, {"group_order": False}):
        arrangement = arrange(hessian.diagonal(), 32, static_groups=True, **options)
        factors = factorize(hessian.clone(), arrangement.order, damping=0.01, step=0.01)
        assert factors is not None
        _, _, scales = rounded(weight, factors, arrangement, grid, trials=0)
        for group in range(4):
            own, _ = fit_asymmetric(weight[:, 32 * group : 32 * group + 32], 4)
            assert torch.equal(scales.scale[group], own.float())


def test_the_search_keeps_the_smallest_zero_point() -> None:
    grid = replace(Scheme.parse("W4A16G32_ASYM").weight, lowest_zero=1)
    weight, hessian = problem(96)
    arrangement = arrange(hessian.diagonal(), 32)
    factors = factorize(hessian, arrangement.order, damping=0.01, step=0.01)
    assert factors is not None
    _, _, scales = rounded(weight.abs(), factors, arrangement, grid)
    assert int(-scales.lowest.max()) >= 1
    assert int((-scales.lowest).max()) <= 15


@pytest.mark.parametrize("columns", [1, 30, 128])
@pytest.mark.parametrize("name", ["W2A16G32", "W4A16", "W3A16_ASYM", "W8A16", "MXFP4", "MXFP8"])
def test_kernels_are_their_definitions(name: str, columns: int) -> None:
    grid, generator = Scheme.parse(name).weight, torch.Generator().manual_seed(columns)
    rows, groups = 100, 3
    weight = torch.randn(columns, rows, generator=generator)
    target = weight + 0.1 * torch.randn(columns, rows, generator=generator)
    coupling = 0.1 * torch.randn(columns, columns, generator=generator)
    strength = torch.rand(columns, generator=generator)
    if grid.scale == "E8M0":
        steps = 2.0 ** torch.randint(-8 if grid.element.bits == 8 else -2, 1, (groups, rows), generator=generator)
        scales = Scales(scale=steps, lowest=torch.full((groups, rows), grid.element.lo))
    else:
        ends = torch.stack((weight.amin(0), weight.amax(0)), -1) * torch.tensor([1.0, 0.8, 0.6])[:, None, None]
        found = [fitted(e, grid) for e in ends]
        scales = Scales(
            scale=torch.stack([f[0] for f in found]).float(), lowest=torch.stack([f[1] for f in found]).float()
        )
    which = torch.randint(0, groups, (columns,), generator=generator)
    ours, theirs = weight.clone(), weight.clone()
    levels = round_block_by_kernel(target, ours, coupling, scales, which, grid)
    expected = round_block_reference(target, theirs, coupling, scales, which, grid)
    assert (levels == expected).float().mean() > 0.999
    alike = (levels == expected).all(0)
    torch.testing.assert_close(ours[:, alike], theirs[:, alike], rtol=1e-5, atol=1e-6)
    losses = trial_losses_by_kernel(target, coupling, strength, scales, grid)
    torch.testing.assert_close(
        losses, trial_losses_reference(target, coupling, strength, scales, grid), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", ["MXFP4", "MXFP8"])
def test_nearest_is_the_small_floats_rounding(name: str) -> None:
    grid = Scheme.parse(name).weight
    values = torch.cat((torch.randn(4000) * torch.logspace(-4, 3, 4000), torch.arange(-12, 12, 0.25)))
    found = nearest(values, torch.full_like(values, grid.element.lo), grid)
    if name == "MXFP4":
        codes = round_e2m1(values).long()
        expected = torch.tensor(E2M1)[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    else:
        expected = round_e4m3(values).float()
    assert torch.equal(found, expected)


def test_threads_and_reference_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, weight, _, arrangement, factors = setting("W4A16G32", 96)
    weight = weight.repeat(9, 1)
    expected, _, _ = rounded(weight, factors, arrangement, grid)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(rounded(weight, factors, arrangement, grid)[0], expected)
    monkeypatch.setenv("ROUNDEL_REFERENCE", "1")
    monkeypatch.setattr(feedback, "ROUNDS", 0)
    slow, _, _ = rounded(weight[:24], factors, arrangement, grid, trials=2)
    monkeypatch.delenv("ROUNDEL_REFERENCE")
    fast, _, _ = rounded(weight[:24], factors, arrangement, grid, trials=2)
    assert (slow == fast).float().mean() > 0.98
