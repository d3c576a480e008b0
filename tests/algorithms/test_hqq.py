"""HQQ: a lower norm than plain rounding on every layer, groups along the input, scales and zero points that files
hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from algorithms.blocks import make_unit
from roundel.algorithms.hqq import Hqq, eight_bits
from roundel.errors import RecipeError
from roundel.ops.encode import encode, encode_scaled
from roundel.scheme import Scheme
from roundel.tensor import QuantizedTensor
from roundel.unit import Unit

SCHEMES = [f"W{bits}A16G32{sym}" for bits in range(2, 9) for sym in ("", "_ASYM")] + ["W4A16G48_ASYM", "W3A16G-1"]
SCHEMES += [f"W{bits}A16G32_HQQ" for bits in (1, 2, 3, 4, 5, 6, 8)] + ["W4A16G48_HQQ", "W3A16G-1_HQQ"]


def unit_of(scheme: str) -> Unit:
    return replace(make_unit(scheme), activations=None)


def norm(weight: Tensor, found: QuantizedTensor, p: float = 0.7) -> float:
    return float((weight.double() - found.decode().double()).abs().pow(p).sum())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_lower_norm_than_plain_rounding_on_every_layer(scheme: str) -> None:
    unit = unit_of(scheme)
    results = Hqq().quantize(unit)
    for layer in unit.layers:
        weight, found = unit.weight(layer), results[layer.name]
        plainly = encode(weight, layer.scheme.weight)
        assert found.error == pytest.approx(norm(weight, found.tensor), rel=1e-5)
        assert found.baseline == pytest.approx(norm(weight, plainly), rel=1e-5)
        assert norm(weight, found.tensor) < norm(weight, plainly)
        assert found.tokens is found.fallback is None


def test_groups_lie_along_the_input_and_zero_points_are_whole() -> None:
    unit = unit_of("W4A16G32_ASYM")
    for layer in unit.layers:
        found = Hqq().quantize(unit)[layer.name].tensor
        assert found.scale.shape == (layer.shape[0], layer.shape[1] // 32)
        assert found.scale.dtype == torch.float16  # type: ignore[union-attr]
        assert found.zero is not None
        assert found.zero.dtype == torch.uint8
        again = encode_scaled(unit.weight(layer), layer.scheme.weight, found.scale, found.zero)
        assert torch.equal(again.codes, found.codes)  # each code is the nearest of its group


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_any_dtype_are_solved_in_float32(dtype: torch.dtype) -> None:
    unit = unit_of("W3A16G32_ASYM")
    narrow = replace(unit, weights={name: w.to(dtype) for name, w in unit.weights.items()})
    wide = replace(unit, weights={name: w.to(dtype).float() for name, w in unit.weights.items()})
    one, other = Hqq().quantize(narrow), Hqq().quantize(wide)
    for name in one:
        assert torch.equal(one[name].tensor.codes, other[name].tensor.codes)
        assert one[name].error == other[name].error


def spread_evenly(values: Tensor) -> bool:
    """Whether positive float16 numbers are within their own rounding of 256 evenly spread ones."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return True
    places = (values.double() - low) / (high - low) * 255
    slack = values.double() * 2**-10 / (high - low) * 255 + 1e-3
    return bool(((places - places.round()).abs() <= slack).all())


@pytest.mark.parametrize("scheme", ["W4A16G32", "W4A16G32_ASYM", "W2A16G16_ASYM"])
@pytest.mark.parametrize("group", [32, 100])
def test_scales_of_eight_bits(scheme: str, group: int) -> None:
    unit = unit_of(scheme)
    plain, results = Hqq().quantize(unit), Hqq(quant_scale=True, meta_group=group).quantize(unit)
    moved = 0
    for layer in unit.layers:
        weight, found, before = unit.weight(layer), results[layer.name], plain[layer.name]
        scale = found.tensor.scale
        assert isinstance(scale, Tensor)
        for part in scale.abs().flatten().split(group):
            assert spread_evenly(part)
        assert torch.equal(torch.sign(scale), torch.sign(before.tensor.scale))  # type: ignore[arg-type]
        moved += int((scale != before.tensor.scale).sum())
        again = encode_scaled(weight, layer.scheme.weight, scale, found.tensor.zero)
        assert torch.equal(again.codes, found.tensor.codes)
        assert found.error == pytest.approx(norm(weight, found.tensor), rel=1e-5)
        assert found.baseline == before.baseline
        assert found.error == pytest.approx(before.error, rel=0.05)
    assert moved > 100
    assert not all(spread_evenly(part) for part in plain[layer.name].tensor.scale.abs().flatten().split(group))  # type: ignore[union-attr]


def test_eight_bits_are_256_evenly_spread_values() -> None:
    values = torch.rand(5, 61, generator=torch.Generator().manual_seed(0)) + 0.5
    found = eight_bits(values, 128).flatten()
    for part, exact in zip(found.split(128), values.flatten().split(128), strict=True):
        grid = torch.linspace(float(exact.min()), float(exact.max()), 256)
        nearest = grid[(exact[:, None] - grid).abs().argmin(1)]
        assert torch.allclose(part, nearest, atol=1e-6)
    assert torch.equal(eight_bits(torch.full((3, 3), 0.25), 2), torch.full((3, 3), 0.25))


@pytest.mark.parametrize("group", [32, 100])
def test_float_zero_points_of_eight_bits(group: int) -> None:
    unit = unit_of("W2A16G16_HQQ")
    plain = Hqq().quantize(unit)
    for layer in unit.layers:
        for how in (Hqq(quant_zero=True, meta_group=group), Hqq(quant_zero=True, quant_scale=True, meta_group=group)):
            found, before = how.quantize(unit)[layer.name], plain[layer.name]
            values = eight_bits(before.tensor.zero.float(), group).half()  # type: ignore[union-attr]
            assert torch.equal(found.tensor.zero, values)  # type: ignore[arg-type]
            assert not torch.equal(found.tensor.zero, before.tensor.zero)  # type: ignore[arg-type]
            moved = not torch.equal(found.tensor.scale, before.tensor.scale)  # type: ignore[arg-type]
            assert moved == how.quant_scale
            again = encode_scaled(unit.weight(layer), layer.scheme.weight, found.tensor.scale, found.tensor.zero)
            assert torch.equal(again.codes, found.tensor.codes)
            assert found.error == pytest.approx(norm(unit.weight(layer), found.tensor), rel=1e-5)
            assert found.error == pytest.approx(before.error, rel=0.05)


def test_zero_points_through_eight_bits_stay_what_they_are() -> None:
    """Whole numbers of at most 8 bits are at most half a step from where 8 bits can put them."""
    for scheme in ("W2A16G32_ASYM", "W8A16G32_ASYM"):
        unit = unit_of(scheme)
        one, other = Hqq().quantize(unit), Hqq(quant_zero=True).quantize(unit)
        for name in one:
            zero = one[name].tensor.zero
            assert zero is not None
            assert torch.equal(zero, other[name].tensor.zero)  # type: ignore[arg-type]
            assert torch.equal(zero.float(), eight_bits(zero.float(), 128).round())
            assert torch.equal(one[name].tensor.codes, other[name].tensor.codes)


def test_fields_reach_the_solver() -> None:
    unit = unit_of("W2A16G32_ASYM")
    unit = replace(unit, weights={name: 40 * w for name, w in unit.weights.items()})  # of a size that shrinks
    usual = {name: r.tensor.codes for name, r in Hqq().quantize(unit).items()}
    for other in (Hqq(iterations=1), Hqq(norm=0.3), Hqq(beta=0.5), Hqq(kappa=2.0)):
        found = other.quantize(unit)
        assert any(not torch.equal(found[name].tensor.codes, usual[name]) for name in usual), other


def test_refusals() -> None:
    layer = make_unit().layers[0]
    for scheme in ("MXFP4", "MXFP8"):
        assert f"not {scheme}" in str(Hqq().refuse(replace(layer, scheme=Scheme.parse(scheme))))
    for scheme in ("W4A16", "W2A16G64_ASYM", "W8A16G-1"):
        assert Hqq().refuse(replace(layer, scheme=Scheme.parse(scheme))) is None
    for field, value in (("iterations", 0), ("norm", 1.5), ("norm", 0.0), ("beta", 0.0), ("kappa", 0.9)):
        with pytest.raises(RecipeError, match=f"hqq: {field}={value} "):
            replace(Hqq(), **{field: value})  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="meta_group=0"):
        Hqq(meta_group=0)


def test_no_data_is_read() -> None:
    assert not Hqq().reads_activations
    assert not Hqq().reads_float_stream
    assert Hqq().passes(128, 8) == 0
