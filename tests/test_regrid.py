"""The same numbers on another grid: each way by itself, and each reason why there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from roundel.ops.encode import encode
from roundel.regrid import is_certain, obstacle, regrid
from roundel.scheme import ELEMENTS, PRESETS, Grid, Scheme
from roundel.tensor import QuantizedTensor

SHAPE = (6, 96)


def grid(name: str, **changes: object) -> Grid:
    return replace(Scheme.parse(name).weight, **changes)  # type: ignore[arg-type]


def on(name: str, seed: int = 1, **changes: object) -> QuantizedTensor:
    """A random matrix on a grid; changes: of its parts."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    return replace(encode(weight, grid(name)), **changes)  # type: ignore[arg-type]


def moved(stored: QuantizedTensor, asked: Grid) -> QuantizedTensor:
    found = regrid(stored, asked)
    assert isinstance(found, QuantizedTensor), found
    assert found.grid == asked and torch.equal(found.decode(), stored.decode())
    return found


def reason(stored: QuantizedTensor, asked: Grid) -> str:
    found = regrid(stored, asked)
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("W4A16G32", grid("W4A16G32_ASYM")),
        ("W4A16G32", grid("W8A16G32")),
        ("W3A16G-1", grid("W4A16G32_ASYM")),
        ("W4A16G32_ASYM", grid("W8A16G32")),
        ("W4A16G32_ASYM", grid("W5A16G32_ASYM")),
        ("W4A16G32_ASYM", grid("W4A16G32_ASYM", scale="F32", offset="F32")),
        ("W4A16G32", PRESETS["GGUF:Q4_0"].weight),
        ("MXINT4", grid("W4A16G32", scale="F32")),
        ("MXFP4", grid("W5A16G32", scale="BF16")),
        ("FPW8A16", PRESETS["FP8_DYNAMIC"].weight),
        ("FPW8A16", grid("FP8_BLOCK", scale="F32")),
    ],
)
def test_always(name: str, asked: Grid) -> None:
    stored = on(name)
    assert obstacle(stored.grid, asked, SHAPE) is None and is_certain(stored.grid, asked)
    moved(stored, asked)


def test_and_back() -> None:
    stored = on("W4A16G32")
    for name in ("W4A16G32_ASYM", "W8A16G32"):
        wide = moved(stored, grid(name))
        if name.startswith("W4"):
            assert torch.equal(moved(wide, stored.grid).codes, stored.codes)
        else:
            assert "int4 has no code for every int8" in reason(wide, stored.grid)
    biased = moved(on("W4A16G32_ASYM"), grid("W4A16G32_ASYM", scale="F32", offset="F32"))
    assert torch.equal(moved(biased, grid("W4A16G32_ASYM")).zero, on("W4A16G32_ASYM").zero)


def test_scales_are_compared_as_numbers() -> None:
    stored = on("W4A16G32")
    fine = replace(stored, grid=grid("W4A16G32", scale="F32"), scale=stored.scale.float())
    moved(fine, stored.grid)
    fine.scale[2, 1] = 0.1  # type: ignore[index]
    assert reason(fine, stored.grid) == "a scale is 0.100000001, which F16 does not hold"
    assert "which BF16 does not hold" in reason(stored, grid("W4A16G32", scale="BF16"))
    fine.scale[2, 1] = 1e-9  # type: ignore[index]
    assert "which F16 does not hold" in reason(fine, stored.grid)


def test_zero_points() -> None:
    stored = on("W4A16G32_ASYM")
    zero = stored.zero
    assert zero is not None
    zero[4, 2] = 0
    version_1 = grid("W4A16G32_ASYM", lowest_zero=1)
    assert not is_certain(stored.grid, version_1)
    assert reason(stored, version_1) == ("the zero point of row 4, group 2 is 0, and readers of it need at least 1")
    moved(replace(stored, zero=zero.clamp(min=1)), version_1)
    assert "int4 ends at -8 and 7" in reason(stored, grid("W4A16G32"))
    moved(replace(stored, zero=torch.full_like(zero, 8)), grid("W4A16G32"))


def test_offsets_and_floats_that_are_no_zero_points() -> None:
    offset = grid("W4A16G32_ASYM", offset="F16")
    stored = moved(on("W4A16G32"), offset)  # 8 times a scale is a float16, too
    moved(stored, grid("W4A16G32_ASYM"))
    assert isinstance(stored.offset, torch.Tensor) and isinstance(stored.scale, torch.Tensor)
    stored.scale[1, 0], stored.offset[1, 0] = 0.25, -2.25
    zero = moved(stored, grid("W4A16G32_ASYM")).zero
    assert zero is not None and int(zero[1, 0]) == 9 and int(zero[1, 1]) == 8
    stored.offset[1, 0] = -2.3125
    assert "which is no whole number from 0 to 15" in reason(stored, grid("W4A16G32_ASYM"))
    assert reason(stored, grid("W4A16G32")) == "it has no offsets and no zero points"
    half = on("W4A16G32_ASYM")
    assert half.zero is not None
    floats = replace(half, grid=replace(half.grid, zero="float"), zero=half.zero.half())
    moved(floats, half.grid)
    floats.zero[0, 0] += 0.5  # type: ignore[index]
    assert reason(floats, half.grid).startswith("in row 0, group 0 the code")


def test_what_grids_rule_out() -> None:
    for name, asked, why in (
        ("W4A16G32", grid("W3A16G32"), "int3 has no code for every int4"),
        ("W4A16G32", grid("W4A16G-1"), "a group of 32 is not cut into whole blocks of it"),
        ("W4A16G32", PRESETS["GGUF:Q4_K"].weight, "its scales would be rounded themselves"),
        ("NF4", grid("W8A16G64"), "int8 has no code for every nf4"),
        ("FPW8A16", PRESETS["MXFP8"].weight, "its scales are powers of two"),
        ("W4A16G32_ASYM", grid("W4A16G32_ASYM", zero="float"), "its zero points are floats"),
    ):
        assert why in str(obstacle(grid(name), asked, (8, 512))), name
    flat = replace(grid("NF4"), flat=True)
    assert obstacle(flat, grid("NF4"), (8, 512)) == "its blocks run over the ends of rows"
    assert obstacle(flat, flat, (8, 512)) is None


def test_a_scale_for_the_tensor_becomes_one_of_1() -> None:
    mlx = Grid(element=ELEMENTS["e2m1"], block=(1, 16), scale="F8_E4M3")
    nested = on("NVFP4A16")
    assert isinstance(nested.scale, QuantizedTensor)
    stored = QuantizedTensor(grid=mlx, codes=nested.codes, scale=nested.scale.codes)
    again = moved(stored, nested.grid)
    assert isinstance(again.scale, QuantizedTensor) and float(again.scale.scale) == 1.0  # type: ignore[arg-type]
    moved(again, mlx)
    assert "which F8_E4M3 does not hold" in reason(nested, mlx)


def test_groups_by_activation_keep_their_index() -> None:
    index = torch.arange(96, dtype=torch.int32) % 3
    stored = on("W4A16G32", group_index=index)
    assert torch.equal(moved(stored, grid("W4A16G32_ASYM")).group_index, index)
    assert "do not lie side by side" in reason(on("W4A16G-1", group_index=torch.zeros_like(index)), grid("W4A16G32"))
