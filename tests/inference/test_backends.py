"""Every backend multiplies by what the codes decode to, over widths, grids, shapes, batches and dtypes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from inference.cases import drawn, layer_of, reference
from roundel.errors import BackendError, RecipeError
from roundel.inference.backends import BACKENDS, choose
from roundel.inference.linear import QuantLinear
from roundel.inference.planes import join_planes, split_planes
from roundel.ops.encode import encode
from roundel.scheme import PRESETS, integer_scheme
from roundel.tensor import QuantizedTensor

SHAPES = {  # (out, in), group: whole blocks and words, and neither
    "whole": ((64, 256), 128),
    "short rows": ((37, 256), 32),
    "short group": ((40, 104), 64),
    "odd columns": ((19, 101), 48),
    "channel": ((33, 77), -1),
    "one": ((1, 16), 16),
    "long channel": ((9, 2600), -1),
}
FLOATS = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a last place of the output
UNIT = 2.0**-16 * 1.001  # of the largest input of a span: what rounding few inputs to 16 bits may change each by
SUMS = 2e-6  # of |x| @ |w|: float32 sums of up to some hundreds, codes with their zero points still in them


def rounding(quantized: QuantizedTensor, x: Tensor) -> Tensor:
    """How far a product may be off when inputs are rounded to 16 bits, by group or 2^(16 - bits) columns of one."""
    width, most = quantized.shape[1], 1 << (16 - quantized.grid.element.bits)
    group, largest = quantized.grid.block_of(quantized.shape)[1], x.abs().double()
    for start in range(0, width, group):
        for first in range(start, min(start + group, width), most):
            part = slice(first, min(first + most, start + group, width))
            largest[:, part] = largest[:, part].amax(1, keepdim=True)
    return UNIT * largest @ quantized.decode().double().abs().T


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_products_are_those_of_decoded_weights(
    backend: str, bits: int, symmetric: bool, shape: str, dtype: torch.dtype
) -> None:
    (out, width), group = SHAPES[shape]
    scheme = integer_scheme(bits, group, symmetric)
    layer, made = layer_of(scheme, (out, width)), BACKENDS[backend]
    if backend == "numba" and bits in (5, 6, 7):
        assert "words of 2, 3, 4, 8 bits" in str(made.refuse(layer, "cpu"))
        return
    assert made.refuse(layer, "cpu") is None
    quantized = drawn(scheme, (out, width))
    generator = torch.Generator().manual_seed(1)
    for bias in (None, torch.randn(out, generator=generator)):
        linear = QuantLinear(layer.name, backend, "cpu", made.make(layer, quantized), (out, width))
        linear.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        for batch in (1, 7, 40):
            x = torch.randn(batch, width, generator=generator).to(dtype)
            expected, size = reference(quantized.decode(), x, bias)
            found = linear(x)
            assert found.dtype == dtype and found.shape == (batch, out)
            allowed = SUMS * size + (rounding(quantized, x) if backend == "numba" else 0)
            allowed = allowed + 2 * FLOATS[dtype] * expected.abs() + FLOATS[dtype] * size * (bias is not None)
            assert bool(((found.double() - expected).abs() <= allowed).all())


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
    scheme, generator = integer_scheme(4, 32), torch.Generator().manual_seed(0)
    index = (torch.randperm(96, generator=generator) // 32).to(torch.int32)
    quantized = replace(drawn(scheme, (24, 96)), group_index=index)
    for batch in (1, 40):
        x = torch.randn(batch, 96, generator=generator)
        expected, size = reference(quantized.decode(), x, None)
        found = BACKENDS[backend].make(layer_of(scheme, (24, 96)), quantized)(x)
        worst = x.abs().amax(1, keepdim=True).expand_as(x).double() @ quantized.decode().double().abs().T
        assert bool(((found.double() - expected).abs() <= SUMS * size + UNIT * worst).all())


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
