"""Block types: the kernels are their definitions bit for bit."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ops.block_cases import MATRICES, importance_of, matrix
from roundel.algorithms import Rtn
from roundel.algorithms.opt_rtn import OptRtn
from roundel.errors import GridError
from roundel.ops.blocks import StoredBlocks, as_tensor, round_blocks, round_blocks_reference
from roundel.ops.encode import encode
from roundel.ops.search import search
from roundel.ops.weighted_error import squared_error
from roundel.scheme import BLOCK_GRIDS, PRESETS
from roundel.unit import Layer, Stored

SHAPES = ((7, 256), (3, 1280))  # an odd number of super-blocks, and blocks that do not fill sixteen lanes
PARTS = ("codes", "scale", "low", "levels", "low_levels")


def given_importance(known: str, weight: Tensor) -> Tensor | None:
    if known == "none":
        return None
    found = importance_of(weight.shape[1])
    return found if known == "columns" else torch.stack([found.roll(row) for row in range(weight.shape[0])])


@cache
def cases() -> list[tuple[str, Tensor]]:
    return [(f"{kind} {shape}", matrix(kind, shape)) for shape in SHAPES for kind in MATRICES]


def assert_same(left: StoredBlocks, right: StoredBlocks, what: str) -> None:
    for part in PARTS:
        a, b = getattr(left, part), getattr(right, part)
        assert (a is None) == (b is None), part
        if a is not None:
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            differing = int((a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).sum())
            assert differing == 0, f"{what}: {differing} bytes of {part}"


@pytest.mark.parametrize("known", ["none", "columns", "weights"])
@pytest.mark.parametrize("name", BLOCK_GRIDS)
def test_kernel_equals_definition(name: str, known: str) -> None:
    for what, weight in cases():
        importance = given_importance(known, weight)
        assert_same(
            round_blocks(weight, name, importance), round_blocks_reference(weight, name, importance), f"{name} {what}"
        )


@pytest.mark.parametrize("name", BLOCK_GRIDS)
def test_many_slabs_are_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix("normal", (7, 512))
    whole = round_blocks_reference(weight, name, importance_of(512))
    monkeypatch.setattr("roundel.ops.blocks.CHUNK", 1024)
    assert_same(round_blocks_reference(weight, name, importance_of(512)), whole, name)


def test_more_bits_err_less() -> None:
    weight = matrix("normal", (8, 1024))

    def error(name: str, importance: Tensor | None = None) -> float:
        rest = weight - as_tensor(round_blocks(weight, name, importance), name).decode()
        return float((rest * rest * (1 if importance is None else importance)).mean() ** 0.5)

    for order in (("Q4_0", "Q5_0", "Q8_0"), ("Q4_1", "Q5_1"), ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")):
        errors = [error(name) for name in order]
        assert all(b < 0.7 * a for a, b in pairwise(errors)), (order, errors)
    for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "IQ4_NL"):
        known = importance_of(1024)
        plainly = (weight - as_tensor(round_blocks(weight, name), name).decode()).square() * known
        assert error(name, known) < float(plainly.mean() ** 0.5), name


@pytest.mark.parametrize("name", BLOCK_GRIDS)
def test_rows_of_broken_blocks_are_refused(name: str) -> None:
    """Kernels believe what they are told of sizes."""
    with pytest.raises(GridError, match="whole blocks"):
        round_blocks(torch.randn(4, BLOCK_GRIDS[name].row_columns + 16), name)
    layer = Layer(name="a", shape=(4, 80), dtype="BF16", scheme=PRESETS[f"GGUF:{name}"], stored=Stored())
    assert "whole blocks of" in str(Rtn().refuse(layer)) and "whole blocks of" in str(OptRtn().refuse(layer))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_encode_gives_ggmls_rounding_and_search_a_better_one(name: str) -> None:
    weight, grid = torch.randn(6, 512, generator=torch.Generator().manual_seed(0)) * 0.02, BLOCK_GRIDS[name]
    importance = torch.rand(512, generator=torch.Generator().manual_seed(1)) ** 4
    assert torch.equal(encode(weight, grid).decode(), as_tensor(round_blocks(weight, name), name).decode())
    found = search(weight, grid, importance)
    weighted = as_tensor(round_blocks(weight, name, importance), name)
    assert found.error < squared_error(weight, weighted, importance) < found.baseline
