"""The same bytes from an accelerator as from the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import roundel
from models.pico import build


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("scheme", ["W4A16G32", "W3A16G32_ASYM", "MXFP4", "MXFP8"])
def test_cuda_equals_cpu(scheme: str, tmp_path: Path) -> None:
    source = build("llama", tmp_path / "m")
    for device in ("cpu", "cuda"):
        roundel.quantize(source, tmp_path / device, scheme=scheme, device=device, workers=2)
    assert (tmp_path / "cpu" / "model.safetensors").read_bytes() == (
        tmp_path / "cuda" / "model.safetensors"
    ).read_bytes()
