"""The kernel decodes to the definition's bits, on every grid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from roundel.ops.decode import decode
from roundel.ops.encode import encode
from roundel.ops.numba.decoding import decode_by_kernel
from roundel.scheme import ELEMENTS, Grid, Scheme
from roundel.tensor import QuantizedTensor

GRIDS = [
    Scheme.parse(f"W{bits}A16G{group}{sym}").weight
    for bits in range(2, 9)
    for group in (32, 48, -1)
    for sym in ("", "_ASYM")
]
GRIDS += [Scheme.parse(name).weight for name in ("MXFP4", "MXFP8")]
SHAPES = ((5, 96), (64, 160), (1, 32), (3000, 320))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_gives_the_definitions_bits(grid: Grid, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) * 0.03 + 0.01
    quantized = encode(weight, grid)
    assert torch.equal(decode_by_kernel(quantized), quantized.decode())


def test_blocks_of_several_rows_offsets_and_tables() -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randn(10, 24, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, generator=generator) + 0.1
    fp8 = QuantizedTensor(grid=Grid(element=ELEMENTS["e4m3"], block=(4, 16), scale="F32"), codes=codes, scale=scale)
    bytes_ = torch.randint(0, 16, (10, 24), generator=generator).to(torch.uint8)
    nf4 = QuantizedTensor(
        grid=Grid(element=ELEMENTS["nf4"], block=(1, 8), scale="F32"), codes=bytes_, scale=torch.rand(10, 3)
    )
    mlx = QuantizedTensor(
        grid=Grid(element=ELEMENTS["uint4"], block=(1, 8), symmetric=False, scale="BF16"),
        codes=bytes_,
        scale=torch.rand(10, 3).bfloat16(),
        offset=torch.randn(10, 3, generator=generator).bfloat16(),
    )
    for quantized in (fp8, nf4, mlx):
        assert torch.equal(decode_by_kernel(quantized), quantized.decode())


def test_a_group_index_takes_the_definition() -> None:
    quantized = encode(torch.randn(8, 64), Scheme.parse("W4A16G32").weight)
    index = torch.tensor([1, 0] * 32, dtype=torch.int32)
    indexed = replace(quantized, group_index=index)
    assert torch.equal(decode(indexed), indexed.decode())
    assert not torch.equal(decode(indexed), decode(quantized))


def test_blocks_that_run_over_the_ends_of_rows() -> None:
    grid = Grid(element=ELEMENTS["nf4"], block=(1, 64), scale="F32", flat=True)
    codes = torch.randint(0, 16, (6, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    quantized = QuantizedTensor(grid=grid, codes=codes, scale=torch.rand(grid.blocks((6, 40))) + 0.5)
    assert torch.equal(decode(quantized), quantized.decode())
