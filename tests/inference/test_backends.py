"""Every backend multiplies by what the codes decode to, over widths, grids, shapes, batches and dtypes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from inference.cases import (
    CELLS,
    FLOATS,
    SUMS,
    Cell,
    drawn,
    layer_of,
    permuted,
    reference,
    rounding,
    share_of_allowed,
)
from roundel.errors import BackendError, RecipeError
from roundel.inference.backends import BACKENDS, choose
from roundel.inference.numba.layout import LAYOUTS
from roundel.inference.planes import join_planes, split_planes
from roundel.ops.encode import encode
from roundel.scheme import PRESETS, integer_scheme


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_products_are_those_of_decoded_weights(backend: str, cell: Cell, dtype: torch.dtype) -> None:
    layer = layer_of(cell.scheme, cell.shape)
    if backend == "numba" and cell.bits not in LAYOUTS:
        assert "words of 2, 3, 4, 8 bits" in str(BACKENDS[backend].refuse(layer, "cpu"))
        return
    assert BACKENDS[backend].refuse(layer, "cpu") is None
    assert share_of_allowed(backend, layer, drawn(cell.scheme, cell.shape), dtype) <= 1


@pytest.mark.parametrize("scale", ["BF16", "F32"])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_scales_of_other_dtypes(backend: str, scale: str) -> None:
    scheme = integer_scheme(4, 32, False)
    scheme = replace(scheme, weight=replace(scheme.weight, scale=scale))
    quantized, x = drawn(scheme, (24, 96)), torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    expected, size = reference(quantized.decode(), x, None)
    found = BACKENDS[backend].make(layer_of(scheme, (24, 96)), quantized)(x)
    assert bool(((found.double() - expected).abs() <= SUMS * size + rounding(quantized, x)).all())


@pytest.mark.parametrize("name", ["MXFP4", "MXFP8"])
def test_floats_are_decoded(name: str) -> None:
    scheme, generator = PRESETS[name], torch.Generator().manual_seed(0)
    quantized = encode(torch.randn(33, 96, generator=generator), scheme.weight)
    layer, x = layer_of(scheme, (33, 96)), torch.randn(7, 96, generator=generator)
    assert choose(layer, "cpu").name == "torch"
    expected, size = reference(quantized.decode(), x, None)
    found = BACKENDS["torch"].make(layer, quantized)(x)
    assert bool(((found.double() - expected).abs() <= SUMS * size).all())


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_columns_of_a_group_may_lie_apart(backend: str) -> None:
    assert share_of_allowed(backend, *permuted(), torch.float32) <= 1


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 64, 101])
def test_planes_are_read_as_they_were_written(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    planes = split_planes(codes, bits)
    assert torch.equal(join_planes(planes, bits, count), codes)
    assert sum(plane.shape[1] for plane in planes) <= count * bits / 8 + len(planes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_weights_stay_packed(backend: str, bits: int) -> None:
    scheme, shape = integer_scheme(bits, 128), (256, 1024)
    module = BACKENDS[backend].make(layer_of(scheme, shape), drawn(scheme, shape))
    held = sum(buffer.nbytes for buffer in module.buffers())
    assert held <= scheme.weight.bits_per_weight(shape) / 8 * shape[0] * shape[1] * 1.01


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_another_dtype_changes_no_number(backend: str) -> None:
    scheme, shape = integer_scheme(4, 32, False), (24, 96)
    quantized = drawn(scheme, shape)
    module = BACKENDS[backend].make(layer_of(scheme, shape), quantized)
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(x), module.half().bfloat16()(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none(value: float) -> None:
    scheme, shape = integer_scheme(4, 32), (24, 96)
    module = BACKENDS["numba"].make(layer_of(scheme, shape), drawn(scheme, shape))
    x = torch.ones(2, 96)
    x[0, 40] = value
    found = module(x)
    assert not found[0].isfinite().any() and found[1].isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e30, 3e38])
def test_inputs_of_any_size(size: float) -> None:
    scheme, shape = integer_scheme(8, 32), (24, 96)
    quantized, x = drawn(scheme, shape), torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    x[1, 32:64] = 0
    x *= size
    found = BACKENDS["numba"].make(layer_of(scheme, shape), quantized)(x / 1000).double()
    expected, length = reference(quantized.decode(), x / 1000, None)
    allowed = SUMS * length + rounding(quantized, x / 1000) + 1e-39  # inputs among the smallest numbers may be lost
    assert bool(((found - expected).abs() <= allowed).all())


def test_a_refusal_names_every_backend() -> None:
    layer = layer_of(integer_scheme(5), (64, 256))
    with pytest.raises(BackendError, match=r"block\.proj .*numba: it has words of 2, 3, 4, 8 bits, not of 5.*Leave"):
        choose(layer, "cpu", "numba")
    with pytest.raises(BackendError, match="numba: it runs on cpu, not on cuda"):
        choose(layer_of(integer_scheme(4), (64, 256)), "cuda:0", "numba")
    with pytest.raises(RecipeError, match="Did you mean 'numba'"):
        choose(layer, "cpu", "nunba")
    assert choose(layer, "cpu").name == "torch"
    assert choose(layer_of(integer_scheme(4), (64, 256)), "cpu").name == "numba"
