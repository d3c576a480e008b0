"""The search for scales: never worse than plain rounding, at or below auto-round's, near the best there is; and the
kernel does what the definition says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ops.cases import KINDS, SHAPES, grids, weights
from roundel.ops.encode import encode, encode_reference
from roundel.ops.numba.search import search_tensor
from roundel.ops.search import search, search_reference
from roundel.ops.weighted_error import squared_error
from roundel.scheme import ELEMENTS, PRESETS, Grid, Scheme
from roundel.tensor import QuantizedTensor

NVFP4 = Grid(element=ELEMENTS["e2m1"], block=(1, 16), scale=Grid(element=ELEMENTS["e4m3"], block=(0, 0), scale="F32"))
GRIDS = grids() | {"NVFP4": NVFP4}


def importances(kind: str, width: int) -> Tensor | None:
    """Importance of input channels: none, spread over some orders of magnitude, or a few channels that are all."""
    if kind == "alike":
        return None
    drawn = torch.randn(width, generator=torch.Generator().manual_seed(width))
    if kind == "spread":
        return torch.exp(1.5 * drawn)
    return torch.where(torch.arange(width) % 13 == 0, 1000.0, 1.0) * torch.exp(drawn)


def drawn(rows: int = 16, width: int = 256, seed: int = 0) -> Tensor:
    """Rows of normal weights, and as many of Student's t with 4 degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, width, generator=generator)
    found[::2] /= torch.randn(rows // 2, width, 4, generator=generator).square().mean(-1).sqrt()
    return found * 0.02


def every_kind(shape: tuple[int, int]) -> Tensor:
    """The shared cases below one another: 7 times as many rows."""
    return torch.cat([weights(case, shape, torch.bfloat16) for case in KINDS])


def block_errors(weight: Tensor, found: QuantizedTensor, importance: Tensor | None) -> np.ndarray:
    """Errors of blocks in float64, written independently of the code under test."""
    lost = (weight.double() - found.decode().double()).square().numpy()
    if importance is not None:
        lost = lost * importance.double().numpy()
    group = found.grid.block_of(found.shape)[1]
    starts = range(0, weight.shape[1], group)
    return np.stack([lost[:, start : start + group].sum(1) for start in starts], axis=1)


def same(left: QuantizedTensor, right: QuantizedTensor) -> bool:
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(parts(left), parts(right), strict=True)
    )


def parts(found: QuantizedTensor) -> list[Tensor]:
    scale = parts(found.scale) if isinstance(found.scale, QuantizedTensor) else [found.scale]
    return [found.codes, *scale, *([found.zero] if found.zero is not None else [])]


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("kind", ["alike", "few"])
def test_no_block_is_worse_than_plainly_rounded(name: str, kind: str) -> None:
    grid = GRIDS[name]
    for shape in SHAPES:
        weight, importance = every_kind(shape), importances(kind, shape[1])
        found, plainly = search(weight, grid, importance), encode(weight, grid)
        ours, theirs = (block_errors(weight.float(), q, importance) for q in (found.tensor, plainly))
        assert (ours <= theirs * (1 + 1e-12)).all(), shape
        assert found.error == pytest.approx(ours.sum(), rel=1e-9)
        assert found.baseline == pytest.approx(theirs.sum(), rel=1e-9)
        assert found.tensor.grid == grid
        if isinstance(found.tensor.scale, Tensor) and grid.element.is_integer:
            assert found.tensor.scale.dtype == torch.float16
            assert (found.tensor.scale.abs() >= 1e-5).all()
            assert found.tensor.scale.isfinite().all()
        if found.tensor.zero is not None:
            assert int(found.tensor.zero.min()) >= grid.lowest_zero


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("kind", ["alike", "spread"])
def test_kernel_does_what_the_definition_says(name: str, kind: str) -> None:
    """Bit for bit on floats; on integers within 1e-6 of the error, and 1e-7 of the weights' own square."""
    grid = GRIDS[name]
    shape = (5, 100)
    weight, importance = every_kind(shape), importances(kind, shape[1])
    kernel, definition = search_tensor(weight, grid, importance), search_reference(weight, grid, importance)
    assert kernel.baseline == pytest.approx(definition.baseline, rel=1e-9)
    if not grid.element.is_integer:
        assert same(kernel.tensor, definition.tensor)
        return
    counted = torch.ones(shape[1]) if importance is None else importance
    energy = (weight.float().square() * counted).view(len(KINDS), -1).sum(1).numpy()
    ours, theirs = (
        block_errors(weight.float(), q.tensor, importance).reshape(len(KINDS), -1).sum(1) for q in (kernel, definition)
    )
    assert (abs(ours - theirs) <= 1e-6 * theirs + 1e-7 * energy).all()


def test_kernel_and_definition_choose_the_same_codes() -> None:
    """On weights like a model's, up to 4 bits."""
    weight, importance = drawn(64, 512), importances("spread", 512)
    for name in ("W4A16", "W4A16_ASYM", "W3A16", "W3A16_ASYM", "W2A16G64", "W2A16G64_ASYM"):
        grid = Scheme.parse(name).weight
        kernel, definition = search_tensor(weight, grid, importance), search_reference(weight, grid, importance)
        assert (kernel.tensor.codes != definition.tensor.codes).float().mean() < 1e-3, name
        assert kernel.error == pytest.approx(definition.error, rel=1e-6), name


def least_symmetric(weight: np.ndarray, importance: np.ndarray, bits: int) -> float:
    """The least error of any real scale of either sign: every set of codes that rounding can produce, in order of the
    scale, each with its least-squares scale."""
    half, power = 2 ** (bits - 1), float((importance * weight**2).sum())
    least = power
    for sign in (1, -1):
        values = sign * weight
        events = []  # one over the scale at which a code moves one further from 0
        for i, value in enumerate(values):
            reach = half - 1 if value > 0 else half
            events += [((k + 0.5) / abs(value), i) for k in range(reach) if value != 0]
        codes, inner, square = np.zeros(len(values)), 0.0, 0.0
        for _, i in sorted(events):
            inner += importance[i] * abs(values[i])
            square += importance[i] * (2 * codes[i] + 1)
            codes[i] += 1
            least = min(least, power - inner**2 / square)
    return least


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["alike", "spread", "few"])
def test_symmetric_search_is_as_good_as_all_scales(bits: int, kind: str) -> None:
    """float16 costs the rest."""
    grid = Scheme.parse(f"W{bits}A16G64").weight
    weight, importance = drawn(16, 64, seed=bits), importances(kind, 64)
    counted = np.ones(64) if importance is None else importance.double().numpy()
    best = sum(least_symmetric(row, counted, bits) for row in weight.double().numpy())
    assert best * (1 - 1e-9) <= search(weight, grid, importance).error <= best * 1.002


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["alike", "spread"])
def test_asymmetric_search_is_as_good_as_all_scales_and_zero_points(bits: int, kind: str) -> None:
    grid, largest = Scheme.parse(f"W{bits}A16G64_ASYM").weight, 2**bits - 1
    weight, importance = drawn(16, 64, seed=bits), importances(kind, 64)
    counted = torch.ones(64) if importance is None else importance
    reach = (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)) / largest
    least = torch.full((16,), torch.inf)
    zero = torch.arange(largest + 1.0)[:, None, None]
    for factor in torch.logspace(-1, 0.3, 300):
        whole = torch.round(weight / (reach * factor))
        codes = torch.minimum(torch.maximum(whole, -zero), largest - zero)
        square = (counted * codes * codes).sum(-1, keepdim=True)
        scale = (counted * weight * codes).sum(-1, keepdim=True) / square.clamp(min=1e-30)
        least = torch.minimum(least, (counted * (weight - codes * scale).square()).sum(-1).amin(0))
    assert search(weight, grid, importance).error <= float(least.sum()) * 1.003


def auto_round_symmetric(weight: Tensor, importance: Tensor, bits: int, group: int) -> float:
    """The error of auto-round 0.16.1's optimized RTN, from its description: a scale is tried for each of some 200
    fractions of the largest weight's, in the weight's dtype; the best is stored in float16."""
    groups = weight.view(weight.shape[0], -1, group)
    counted = importance.view(-1, group)
    half = 2 ** (bits - 1)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    step, reach = (0.01, 90) if bits == 2 else (0.75 * half / 100, 100)
    best, least = torch.zeros_like(extreme), torch.full(extreme.shape, torch.inf)
    for i in (i for i in range(-reach, reach + 1) if i):
        inverse = -(half - step * i) * (1 / extreme)
        codes = torch.round(inverse * groups).clamp(-half, half - 1)
        loss = (counted * ((1 / inverse) * codes - groups).float().square()).sum(-1, keepdim=True)
        best, least = torch.where(loss < least, 1 / inverse, best), torch.minimum(loss, least)
    codes = torch.round(groups / best).clamp(-half, half - 1).float()
    rest = groups.double() - (codes * best.half().float()).double()
    return float((counted.double() * rest.square()).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["alike", "spread", "few"])
def test_integers_are_at_or_below_auto_round(dtype: torch.dtype, kind: str) -> None:
    """It searches in bfloat16, and without least squares; asymmetrically it does not search."""
    weight, importance = drawn(16, 256, seed=5).to(dtype), importances(kind, 256)
    counted = torch.ones(256) if importance is None else importance
    for bits in range(2, 9):
        group = 128 if bits > 2 else 64
        theirs = auto_round_symmetric(weight, counted, bits, group)
        assert search(weight, Scheme.parse(f"W{bits}A16G{group}").weight, importance).error <= theirs, bits
        asymmetric = search(weight, Scheme.parse(f"W{bits}A16G{group}_ASYM").weight, importance)
        assert asymmetric.error < asymmetric.baseline


def nearest(values: Tensor, element: str) -> Tensor:
    """Values rounded to e2m1 or e4m3, by looking for the nearest in a list."""
    if element == "e2m1":
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    else:
        table = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    distance = (values.abs()[..., None] - table).abs()
    return torch.sign(values) * table[distance.argmin(-1)]


@pytest.mark.parametrize("name", ["MXFP4", "MXFP8"])
@pytest.mark.parametrize("kind", ["alike", "few"])
def test_mx_is_at_or_below_auto_round(name: str, kind: str) -> None:
    """It tries an exponent more and one less."""
    grid, weight, importance = PRESETS[name].weight, drawn(8, 128), importances(kind, 128)
    counted = (torch.ones(128) if importance is None else importance).view(-1, 32).double()
    groups = weight.view(8, -1, 32)
    floor = torch.floor(torch.log2(groups.abs().amax(-1, keepdim=True))) - (2 if name == "MXFP4" else 8)
    tried = []
    for change in (0, -1, 1):
        scale = 2.0 ** (floor + change)
        rest = groups.double() - (nearest(groups / scale, grid.element.name) * scale).double()
        tried.append((counted * rest.square()).sum(-1))
    theirs = torch.stack(tried).amin(0)
    found = search(weight, grid, importance)
    assert (block_errors(weight, found.tensor, importance) <= theirs.numpy() * (1 + 1e-6)).all()
    assert found.error < found.baseline


@pytest.mark.parametrize("kind", ["alike", "few"])
def test_nvfp4_is_at_or_below_auto_round(kind: str) -> None:
    """It multiplies the fitted block scale by 0.50, 0.51 ... 1.51 before rounding it to e4m3."""
    weight, importance = drawn(8, 128), importances(kind, 128)
    counted = (torch.ones(128) if importance is None else importance).view(-1, 16).double()
    groups, upscale = weight.view(8, -1, 16), 448 * 6 / weight.abs().max()
    least = torch.full((8, 8), torch.inf, dtype=torch.float64)
    for factor in range(50, 152):
        fitted = upscale * groups.abs().amax(-1) / 6 * (factor / 100)
        scale = fitted.clamp(max=448).to(torch.float8_e4m3fn).float()[..., None] / upscale
        rest = groups.double() - (nearest((groups / scale).clamp(-6, 6), "e2m1") * scale).double()
        least = torch.minimum(least, (counted * rest.square()).sum(-1))
    found = search(weight, NVFP4, importance)
    assert found.error <= float(least.sum()) * (1 + 1e-6)
    assert found.error < 0.9 * found.baseline


def test_nvfp4_is_its_description() -> None:
    """One float for the tensor, an e4m3 scale for 16 weights, e2m1 codes; a block of zeros is zeros."""
    weight = drawn(4, 64)
    weight[1, 16:32] = 0
    found = encode_reference(weight, NVFP4)
    upscale = np.float32(448 * 6) / np.float32(weight.abs().max())
    for row in range(4):
        for block in range(4):
            values = weight[row, 16 * block : 16 * block + 16]
            fitted = torch.tensor(upscale * (np.float32(values.abs().max()) * np.float32(1 / 6)))
            scale = fitted.to(torch.float8_e4m3fn)
            assert found.scale.codes[row, block] == scale  # type: ignore[union-attr]
            step = np.float32(scale.float()) * (np.float32(1) / upscale)
            expected = nearest((values / step).clamp(-6, 6), "e2m1") * step if step else torch.zeros(16)
            assert torch.allclose(found.decode()[row, 16 * block : 16 * block + 16], expected, rtol=1e-6, atol=0)
    assert encode(torch.zeros(2, 32), NVFP4).decode().abs().max() == 0


@pytest.mark.parametrize("name", ["W4A16", "W3A16_ASYM", "MXFP4"])
def test_importance_moves_error_away_from_what_counts(name: str) -> None:
    grid, weight = GRIDS.get(name) or Scheme.parse(name).weight, drawn(32, 256)
    importance = importances("few", 256)
    assert importance is not None
    counted, alike = search(weight, grid, importance), search(weight, grid)
    assert counted.error < 0.9 * squared_error(weight, alike.tensor, importance)
    assert alike.error < squared_error(weight, counted.tensor)
    assert same(search(weight, grid, 4 * importance).tensor, counted.tensor)


@pytest.mark.parametrize("name", ["W4A16", "W2A16G32_ASYM", "MXFP4"])
def test_a_block_without_importance_counts_its_weights_alike(name: str) -> None:
    grid, weight = GRIDS[name], drawn(8, 256)
    importance = importances("spread", 256)
    assert importance is not None
    importance[128:] = 0
    group = grid.block_of((8, 256))[1]
    for found in (search(weight, grid, importance), search_reference(weight, grid, importance)):
        alike = search(weight, grid)
        assert torch.equal(found.tensor.codes[:, 128:].view(torch.uint8), alike.tensor.codes[:, 128:].view(torch.uint8))
        assert not torch.equal(
            found.tensor.scale[:, : 128 // group].view(torch.uint8),  # type: ignore[index]
            alike.tensor.scale[:, : 128 // group].view(torch.uint8),  # type: ignore[index]
        )


@pytest.mark.parametrize("bits", range(2, 8))
def test_weights_on_a_grid_are_found(bits: int) -> None:
    """A grid that no weight's largest magnitude gives away: plain rounding misses it, the search does not."""
    codes = torch.randint(1, 2**bits - 1, (16, 64), generator=torch.Generator().manual_seed(bits)).float()
    for grid, zero in ((Scheme.parse(f"W{bits}A16G64").weight, 2 ** (bits - 1)), (None, 2 ** (bits - 1) - 1)):
        grid = grid or Scheme.parse(f"W{bits}A16G64_ASYM").weight
        weight = (codes - zero) * 0.01171875
        found = search(weight, grid)
        assert found.error <= 1e-9 * float(weight.square().sum()), grid
        if grid.symmetric and bits > 2:
            assert found.baseline > 1e-5 * float(weight.square().sum())


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "MXFP8", "NVFP4"])
def test_how_weights_lie_in_memory_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from roundel.ops.numba import search as module

    grid, weight, importance = GRIDS[name], drawn(40, 128).bfloat16(), importances("spread", 128)
    found = search(weight, grid, importance)
    wide = torch.zeros(80, 256, dtype=torch.bfloat16)
    wide[::2, ::2] = weight
    monkeypatch.setattr(module, "SLAB", 8 * 128)
    for other in (weight.T.contiguous().T, wide[::2, ::2], weight.float(), weight.float().requires_grad_()):
        assert same(search(other, grid, importance, threads=3).tensor, found.tensor)
    again = search(weight, grid, importance, threads=2)
    assert (again.error, again.baseline) == pytest.approx((found.error, found.baseline), rel=1e-12)


def test_reference_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    from roundel.ops import search as module

    called: list[Grid] = []
    monkeypatch.setattr(module, "search_reference", lambda w, g, i, r: called.append(g))
    monkeypatch.setenv("ROUNDEL_REFERENCE", "1")
    module.search(torch.zeros(2, 32), PRESETS["MXFP4"].weight)
    assert called


def test_limits_of_zero_points_are_kept() -> None:
    free = Scheme.parse("W2A16G32_ASYM").weight
    weight = drawn(32, 64).abs() - 0.001
    bound = search(weight, replace(free, lowest_zero=1))
    assert int(bound.tensor.zero.min()) == 1  # type: ignore[union-attr]
    assert search(weight, free).error <= bound.error * 1.001
