"""Matrices on every grid that is executed, what their decoded product is, and how far each backend may be from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from roundel.inference.backends import BACKENDS
from roundel.inference.linear import QuantLinear
from roundel.ops.encode import encode
from roundel.scheme import PRESETS, Scheme, integer_scheme
from roundel.tensor import QuantizedTensor
from roundel.unit import Layer, Stored

__all__ = [
    "CELLS",
    "FLOATS",
    "SUMS",
    "UNIT",
    "Cell",
    "drawn",
    "floats",
    "gradient_share_of_allowed",
    "layer_of",
    "permuted",
    "reference",
    "rounding",
    "share_of_allowed",
]

SCALES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
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
BATCHES = (1, 7, 40)
TINY = 2.0**-24  # the smallest float16
UNIT = 2.0**-16 * 1.001  # of the largest input of a span: what rounding few inputs to 16 bits may change each by
FOREIGN = {"marlin": 2.0**-8, "exllamav2": 2.0**-9}  # of |x| @ |w|: they round weights to the dtype they multiply in
SUMS = 2e-6  # of |x| @ |w|: float32 sums of up to some hundreds, codes with their zero points still in them


@dataclass(frozen=True)
class Cell:
    """Integers of one width, as a matrix of one shape: `kind` is one of SHAPES."""

    bits: int
    symmetric: bool
    kind: str

    @property
    def name(self) -> str:
        return f"{self.bits} bits {'sym' if self.symmetric else 'asym'} {self.kind}"

    @property
    def scheme(self) -> Scheme:
        return integer_scheme(self.bits, SHAPES[self.kind][1], self.symmetric)

    @property
    def shape(self) -> tuple[int, int]:
        return SHAPES[self.kind][0]


CELLS = [Cell(*each) for each in product(range(2, 9), (True, False), SHAPES)]


def layer_of(scheme: Scheme, shape: tuple[int, int]) -> Layer:
    """A layer stored on a scheme's grid."""
    stored = Stored(format="auto_round", scheme=scheme)
    return Layer(name="block.proj", shape=shape, dtype="BF16", scheme=scheme, stored=stored)


def drawn(scheme: Scheme, shape: tuple[int, int], seed: int = 0) -> QuantizedTensor:
    """Random codes over the whole range, scales of both signs, and zero points, on an integer grid."""
    grid, generator = scheme.weight, torch.Generator().manual_seed(seed)
    assert isinstance(grid.scale, str)
    low, high, blocks = int(grid.element.lo), int(grid.element.hi), grid.blocks(shape)
    codes = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int16)
    scale = torch.randn(blocks, generator=generator) * 0.01
    zero = None if grid.symmetric else torch.randint(0, high + 1, blocks, generator=generator, dtype=torch.uint8)
    kind = torch.int8 if grid.symmetric else torch.uint8
    return QuantizedTensor(grid=grid, codes=codes.to(kind), scale=scale.to(SCALES[grid.scale]), zero=zero)


def permuted() -> tuple[Layer, QuantizedTensor]:
    """Four bits whose groups' columns lie apart."""
    scheme, generator = integer_scheme(4, 32), torch.Generator().manual_seed(0)
    index = (torch.randperm(96, generator=generator) // 32).to(torch.int32)
    return layer_of(scheme, (24, 96)), replace(drawn(scheme, (24, 96)), group_index=index)


def floats(*names: str) -> Iterator[tuple[str, Layer, QuantizedTensor]]:
    """Rounded matrices on the grids of these presets: whole blocks, and not."""
    for name, shape in product(names, ((33, 96), (16, 256), (5, 1088))):
        weights = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        weights *= torch.logspace(-4, 2, shape[0])[:, None]
        yield f"{name} {shape}", layer_of(PRESETS[name], shape), encode(weights, PRESETS[name].weight)


def reference(weights: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x @ weights.T + bias in float64, and what its sums' rounding is measured by: |x| @ |weights|.T + |bias|."""
    wide, entering = weights.double(), x.double()
    size, exact = entering.abs() @ wide.abs().T, entering @ wide.T
    if bias is None:
        return exact, size
    return exact + bias.double(), size + bias.double().abs()


def rounding(quantized: QuantizedTensor, x: Tensor) -> Tensor:
    """How far a product may be off when inputs are rounded to 16 bits, by group or 2^(16 - bits) columns of one."""
    width, most = quantized.shape[1], 1 << (16 - quantized.grid.element.bits)
    group, largest = quantized.grid.block_of(quantized.shape)[1], x.abs().double()
    if quantized.group_index is not None:  # a group's columns lie anywhere
        return UNIT * largest.amax(1, keepdim=True) * quantized.decode().double().abs().sum(1)
    for start in range(0, width, group):
        for first in range(start, min(start + group, width), most):
            part = slice(first, min(first + most, start + group, width))
            largest[:, part] = largest[:, part].amax(1, keepdim=True)
    return UNIT * largest @ quantized.decode().double().abs().T


def share_of_allowed(
    backend: str,
    layer: Layer,
    quantized: QuantizedTensor,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    biases: Sequence[bool] = (False, True),
    batches: Sequence[int] = BATCHES,
) -> float:
    """The largest error of a backend's products, as a share of what it states."""
    out, width = layer.shape
    made, generator, found = BACKENDS[backend], torch.Generator().manual_seed(1), 0.0
    for bias in (torch.randn(out, generator=generator) if has_one else None for has_one in biases):
        kernel = made.make(layer, _on(quantized, device))
        linear = QuantLinear(layer.name, backend, device, kernel, (out, width))
        linear.bias = None if bias is None else torch.nn.Parameter(bias.to(device), requires_grad=False)
        for batch in batches:
            x = torch.randn(batch, width, generator=generator).to(dtype)
            expected, size = reference(quantized.decode(), x, bias)
            y = linear(x.to(device))
            assert y.dtype == dtype and y.shape == (batch, out)
            allowed = _allowed(backend, quantized, x, size, dtype) + 2 * FLOATS[dtype] * expected.abs()
            allowed = allowed + FLOATS[dtype] * size * (bias is not None) + (TINY if dtype == torch.float16 else 0)
            found = max(found, float(((y.cpu().double() - expected).abs() / allowed).max()))
    return found


def gradient_share_of_allowed(
    backend: str, layer: Layer, quantized: QuantizedTensor, dtype: torch.dtype, batch: int = 3
) -> float:
    """The largest error of the gradient that a backend's inputs get, as a share of what sums and dtypes allow."""
    linear = QuantLinear(layer.name, backend, "cpu", BACKENDS[backend].make(layer, quantized), layer.shape)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(batch, layer.shape[0], generator=generator).to(dtype)
    x = torch.randn(batch, layer.shape[1], generator=generator).to(dtype).requires_grad_()
    linear(x).backward(gradient)
    exact, size = reference(quantized.decode().T, gradient, None)
    assert x.grad is not None and x.grad.dtype == dtype
    allowed = (SUMS + 2 * FLOATS[dtype]) * size + (TINY if dtype == torch.float16 else 1e-30)  # where weights are zero
    return float(((x.grad.double() - exact).abs() / allowed).max())


def _allowed(backend: str, quantized: QuantizedTensor, x: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a product without a bias, in float32, may be from the exact one."""
    if backend in FOREIGN:
        return FOREIGN[backend] * size
    return SUMS * size + (rounding(quantized, x) if backend == "numba" else 0)


def _on(quantized: QuantizedTensor, device: str) -> QuantizedTensor:
    if device == "cpu":
        return quantized
    parts = {name: getattr(quantized, name) for name in ("codes", "scale", "zero", "group_index")}
    return replace(quantized, **{name: part.to(device) for name, part in parts.items() if part is not None})
