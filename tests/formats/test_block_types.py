"""ggml's block types: bytes and numbers are each other's inverse, and both are ggml's own on files it made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ops.block_cases import importance_of, matrix, random_stored
from roundel.errors import GridError
from roundel.formats.gguf.block_types import BLOCK_TYPES
from roundel.ops.blocks import as_stored, as_tensor, round_blocks_reference
from roundel.scheme import BLOCK_GRIDS

# What ggml made of four rows: normal weights, heavy tails, constants and zeros, positive ones; plain and with
# importance. Written by tests/peers/run_ggml.py (llama.cpp as of xllamacpp 2026.10.11549).
GOLDEN = np.load(Path(__file__).parent / "data" / "ggml_blocks.npz")
SHAPES = ((1, 256), (3, 512), (5, 768))


def test_every_grid_is_a_type() -> None:
    assert set(BLOCK_TYPES) == set(BLOCK_GRIDS)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_fields_fill_a_block(name: str) -> None:
    kind = BLOCK_TYPES[name]
    assert sum(kind.field_bytes(field) for field in kind.fields) == kind.nbytes
    stored_bits = kind.nbytes * 8 / kind.weights
    assert stored_bits == BLOCK_GRIDS[name].bits_per_weight((4, 512)) or name == "TQ1_0"  # 5 in 8 bits, not 2 each


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_pack_and_back(name: str) -> None:
    kind = BLOCK_TYPES[name]
    for shape in SHAPES:
        stored = random_stored(name, shape)
        tensor = as_tensor(stored, name)
        packed = kind.pack(tensor)
        assert packed.dtype == torch.uint8
        assert tuple(packed.shape) == (shape[0], kind.row_bytes(shape[1]))
        assert torch.equal(packed, kind.pack_stored_reference(stored))
        for again in (kind.unpack_stored(packed), as_stored(kind.unpack(packed)), as_stored(tensor)):
            for part in ("codes", "scale", "low", "levels", "low_levels"):
                left, right = getattr(stored, part), getattr(again, part)
                assert (left is None) == (right is None)
                if left is not None:
                    assert torch.equal(left.view(torch.uint8), right.contiguous().view(torch.uint8)), part


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_decodes_what_ggml_wrote(name: str) -> None:
    packed, decoded = torch.from_numpy(GOLDEN[f"plain/{name}"]), torch.from_numpy(GOLDEN[f"plain/{name}/decoded"])
    tensor = BLOCK_TYPES[name].unpack(packed)
    assert torch.equal(tensor.decode(), decoded)
    assert torch.equal(BLOCK_TYPES[name].pack(tensor), packed)


@pytest.mark.parametrize("kind", ["plain", "known"])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rounds_to_the_bytes_of_ggml(name: str, kind: str) -> None:
    importance = torch.from_numpy(GOLDEN["importance"]) if kind == "known" else None
    stored = round_blocks_reference(torch.from_numpy(GOLDEN["weight"]), name, importance)
    packed = BLOCK_TYPES[name].pack_stored(stored)
    assert torch.equal(packed, torch.from_numpy(GOLDEN[f"{kind}/{name}"]))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_in_slabs_it_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roundel.formats.gguf.block_types.SLAB", 1024)
    kind, weight, importance = BLOCK_TYPES[name], matrix("normal", (7, 512)), importance_of(512)
    for known in (None, importance, torch.stack([importance.roll(row) for row in range(7)])):
        whole = kind.pack_stored_reference(round_blocks_reference(weight, name, known))
        assert torch.equal(kind.round_and_pack(weight, known), whole)


def test_another_grid_is_refused() -> None:
    with pytest.raises(GridError, match="Q4_K stores its own grid"):
        BLOCK_TYPES["Q4_K"].pack(as_tensor(random_stored("Q5_K", (1, 256)), "Q5_K"))
    with pytest.raises(GridError, match="100 inputs"):
        BLOCK_TYPES["Q4_0"].row_bytes(100)
