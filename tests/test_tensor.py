"""QuantizedTensor: its law, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from roundel.errors import GridError
from roundel.scheme import ELEMENTS, Grid, Scheme
from roundel.tensor import QuantizedTensor

SYM = Scheme.parse("W4A16G32").weight
ASYM = Scheme.parse("W4A16G32_ASYM").weight


def slow_decode(q: QuantizedTensor) -> torch.Tensor:
    """The law, one weight at a time."""
    out, width = q.shape
    rows, columns = q.grid.block_of(q.shape)
    found = torch.zeros(out, width)
    for i in range(out):
        for j in range(width):
            block = (i // rows, j // columns if q.group_index is None else int(q.group_index[j]))
            code = q.codes[i, j].float()
            if q.grid.element.values is not None:
                code = torch.tensor(q.grid.element.values[int(q.codes[i, j])])
            zero = q.zero[block].float() if q.zero is not None else 0.0
            scale = q.scale[block].float() if isinstance(q.scale, torch.Tensor) else slow_decode(q.scale)[block]
            found[i, j] = (code - zero) * scale + (q.offset[block] if q.offset is not None else 0.0)
    return found


@pytest.mark.parametrize("width", [64, 70])
def test_decode_is_the_law(width: int) -> None:
    codes = torch.randint(0, 16, (5, width), dtype=torch.uint8)
    blocks = (5, -(-width // 32))
    scale, zero = torch.rand(blocks).half(), torch.randint(0, 16, blocks, dtype=torch.uint8)
    cases = [
        QuantizedTensor(grid=ASYM, codes=codes, scale=scale, zero=zero),
        QuantizedTensor(grid=SYM, codes=(codes.short() - 8).to(torch.int8), scale=scale),
        QuantizedTensor(grid=ASYM, codes=codes, scale=scale, offset=torch.randn(blocks)),
        QuantizedTensor(grid=Grid(element=ELEMENTS["nf4"], block=(1, 32)), codes=codes, scale=scale),
        QuantizedTensor(
            grid=ASYM, codes=codes, scale=scale, zero=zero, group_index=torch.randint(0, blocks[1], (width,))
        ),
        QuantizedTensor(
            grid=Grid(element=ELEMENTS["e4m3"], block=(2, 32), scale="F32"),
            codes=torch.randn(5, width).to(torch.float8_e4m3fn),
            scale=torch.rand(3, blocks[1]),
        ),
        QuantizedTensor(
            grid=Grid(
                element=ELEMENTS["e2m1"], block=(1, 32), scale=Grid(element=ELEMENTS["e4m3"], block=(0, 0), scale="F32")
            ),
            codes=codes,
            scale=QuantizedTensor(
                grid=Grid(element=ELEMENTS["e4m3"], block=(0, 0), scale="F32"),
                codes=torch.rand(blocks).to(torch.float8_e4m3fn),
                scale=torch.tensor([[0.3]]),
            ),
        ),
    ]
    for case in cases:
        assert torch.equal(case.decode(), slow_decode(case))


ONE, TWO = torch.ones(2, 1), torch.ones(2, 2)
SIGNED, UNSIGNED = torch.zeros(2, 32, dtype=torch.int8), torch.zeros(2, 32, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("grid", "fields"),
    [
        (SYM, {"codes": SIGNED + 8, "scale": ONE}),
        (SYM, {"codes": SIGNED, "scale": TWO}),
        (SYM, {"codes": SIGNED, "scale": ONE, "zero": ONE}),
        (SYM, {"codes": SIGNED[0], "scale": ONE}),
        (ASYM, {"codes": UNSIGNED, "scale": ONE}),
        (ASYM, {"codes": UNSIGNED, "scale": ONE, "zero": ONE[:1]}),
        (ASYM, {"codes": UNSIGNED, "scale": ONE, "zero": ONE, "offset": ONE}),
        (SYM, {"codes": SIGNED, "scale": ONE, "group_index": torch.ones(32)}),
        (SYM, {"codes": SIGNED, "scale": ONE, "group_index": torch.zeros(31)}),
    ],
)
def test_disagreement_with_the_grid_is_refused(grid: Grid, fields: dict[str, torch.Tensor]) -> None:
    with pytest.raises(GridError):
        QuantizedTensor(grid=grid, **fields)
