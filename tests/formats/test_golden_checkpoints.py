"""Checkpoints that other tools wrote decode to the same numbers as these tools' own decode.

Files and numbers were made by `tests/peers/make_golden.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from roundel.checkpoint import open_checkpoint

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


@pytest.mark.parametrize("folder", sorted(GOLDEN.iterdir()), ids=lambda folder: folder.name)
def test_decodes_to_the_same_numbers(folder: Path) -> None:
    expected = load_file(folder / "decoded.safetensors")
    checkpoint = open_checkpoint(folder)
    try:
        assert set(checkpoint.layers) == set(expected)
        for name, rows in expected.items():
            assert torch.equal(checkpoint.decode(name)[: len(rows)], rows), name
    finally:
        checkpoint.close()
