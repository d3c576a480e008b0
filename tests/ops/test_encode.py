"""Rounding: the kernel is its definition bit for bit, and the definition is what a slow obvious text says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ops.cases import DTYPES, KINDS, SHAPES, grids, weights
from roundel.ops.encode import encode, encode_reference
from roundel.ops.minifloat import decode_e8m0, round_e2m1, round_e4m3
from roundel.ops.numba.tensors import encode_tensor
from roundel.scheme import PRESETS, Grid, Scheme
from roundel.tensor import QuantizedTensor, plain


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_same(left: QuantizedTensor, right: QuantizedTensor) -> None:
    assert torch.equal(bits_of(left.codes), bits_of(right.codes))
    assert torch.equal(bits_of(left.scale), bits_of(right.scale))  # type: ignore[arg-type]
    assert (left.zero is None) == (right.zero is None)
    if left.zero is not None and right.zero is not None:
        assert torch.equal(left.zero, right.zero)


@pytest.mark.parametrize("name", grids())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_equals_definition(name: str, dtype: torch.dtype) -> None:
    grid, tried = grids()[name], 0
    for shape in SHAPES:
        for kind in KINDS:
            weight = weights(kind, shape, dtype)
            kernel = encode_tensor(weight, grid)
            if kernel is None:
                assert shape[1] % 32, "only short MX groups may go without a kernel"
                continue
            tried += 1
            assert_same(kernel, encode_reference(weight, grid))
    assert tried >= 2 * len(KINDS)


def slow_symmetric(row: list[float], bits: int) -> tuple[float, list[int]]:
    """One group, in Python floats: the weight of largest magnitude lands on the lowest code."""
    high, low = max(0.0, *row), max(0.0, *(-w for w in row))
    scale = torch.tensor((low if low > high else -high) / 2 ** (bits - 1), dtype=torch.float32).half().float().item()
    least = torch.tensor(1e-5).half().float().item()
    if abs(scale) < least:
        scale = math.copysign(least, scale) if scale < 0 else least
    codes = []
    for w in row:
        quotient = (torch.tensor(w) / torch.tensor(scale)).item()
        codes.append(max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, round(quotient))))  # round() is half to even
    return scale, codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_definition_is_full_range_symmetric(bits: int) -> None:
    grid = Scheme.parse(f"W{bits}A16G32").weight
    for kind in KINDS:
        weight = weights(kind, (4, 64), torch.float32)
        found = encode_reference(weight, grid)
        for row in range(4):
            for group in range(2):
                scale, codes = slow_symmetric(weight[row, 32 * group : 32 * group + 32].tolist(), bits)
                assert found.scale[row, group].item() == scale  # type: ignore[index,union-attr]
                assert found.codes[row, 32 * group : 32 * group + 32].tolist() == codes


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_asymmetric_reaches_half_a_step(bits: int) -> None:
    weight = weights("normal", (16, 128), torch.float32)
    found = encode_reference(weight, Scheme.parse(f"W{bits}A16_ASYM").weight)
    step = found.scale.float()  # type: ignore[union-attr]
    assert ((weight - found.decode()).abs() <= 0.5 * step * 1.02 + 1e-7).float().mean() > 0.98
    assert ((weight - found.decode()).abs() <= 1.0 * step * 1.02 + 1e-7).all()


def test_lowest_zero_changes_only_groups_without_negatives() -> None:
    grid = grids()["W4A16_ASYM"]
    limited = grids()["W4A16_ASYM, zero >= 1"]
    weight = torch.cat([weights("normal", (4, 128), torch.float32), weights("positive", (4, 128), torch.float32)])
    free, bound = encode_reference(weight, grid), encode_reference(weight, limited)
    assert torch.equal(free.codes[:4], bound.codes[:4])
    assert int(free.zero[4:].max()) == 0  # type: ignore[index]
    assert int(bound.zero.min()) == 1  # type: ignore[union-attr]
    error = (weight - bound.decode()).abs().max()
    assert error <= 0.51 * bound.scale.float().max()  # type: ignore[union-attr]


def test_e2m1_rounds_to_the_nearest_value_ties_to_even() -> None:
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat(
        [torch.linspace(-8, 8, 4001), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, -0.0, 0.0])]
    )
    for value, code in zip(values.tolist(), round_e2m1(values).tolist(), strict=True):
        distance = (table - min(abs(value), 6.0)).abs()
        nearest = [i for i in range(8) if distance[i] == distance.min()]
        assert code & 7 in nearest
        assert len(nearest) == 1 or (code & 7) % 2 == 0
        assert code >> 3 == (value < 0)


def test_e4m3_equals_torch() -> None:
    values = torch.randn(5000) * torch.logspace(-4, 3, 5000)
    assert torch.equal(bits_of(round_e4m3(values)), bits_of(values.clamp(-448, 448).to(torch.float8_e4m3fn)))
    assert bits_of(round_e4m3(torch.tensor([-0.0]))).item() == 0


def test_e8m0_covers_its_range() -> None:
    codes = torch.arange(255, dtype=torch.uint8)
    assert decode_e8m0(codes).tolist() == [2.0 ** (c - 127) for c in range(255)]


@pytest.mark.parametrize("name", ["MXFP4", "MXFP8"])
def test_mx_scale_is_the_specification(name: str) -> None:
    grid, emax = PRESETS[name].weight, 2 if name == "MXFP4" else 8
    weight = weights("outlier", (8, 64), torch.bfloat16)
    found = encode_reference(weight, grid)
    for row in range(8):
        for group in range(2):
            largest = weight[row, 32 * group : 32 * group + 32].float().abs().max().item()
            assert bits_of(found.scale[row, group : group + 1]).item() == math.floor(math.log2(largest)) - emax + 127  # type: ignore[index]


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "FP8_BLOCK", "FPW8A16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_is_divided_once_by_the_scale_that_is_stored(name: str, dtype: torch.dtype) -> None:
    """auto-round rounds scales to bfloat16 after it used them, and divides whole blocks in bfloat16."""
    grid, weight = PRESETS[name].weight, weights("outlier", (200, 300), dtype)
    found, (rows, columns) = encode(weight, grid), grid.block_of((200, 300))
    scale = plain(found.scale).repeat_interleave(rows, 0)[:200].repeat_interleave(columns, 1)[:, :300]
    assert isinstance(found.scale, Tensor) and found.scale.dtype == torch.bfloat16
    assert torch.equal(bits_of(found.codes), bits_of((weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)))


def test_non_finite_weights_have_no_kernel() -> None:
    weight = torch.zeros(4, 32)
    weight[2, 5] = float("nan")
    assert encode_tensor(weight, Scheme.parse("W4A16G32").weight) is None
    assert encode_tensor(weight, PRESETS["MXFP4"].weight) is None


def test_reference_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    from roundel.ops import encode as module

    called: list[Grid] = []
    monkeypatch.setattr(module, "encode_reference", lambda w, g, r: called.append(g))
    monkeypatch.setenv("ROUNDEL_REFERENCE", "1")
    module.encode(torch.zeros(2, 32), PRESETS["MXFP4"].weight)
    assert called
