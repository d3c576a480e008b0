"""The same bytes from an accelerator as from the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import roundel
from inference.cases import CELLS, FLOATS, Cell, drawn, floats, layer_of, share_of_allowed
from models.pico import build
from roundel.inference.backends import BACKENDS
from roundel.scheme import integer_scheme


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("scheme", ["W4A16G32", "W3A16G32_ASYM", "MXFP4", "MXFP8"])
def test_cuda_equals_cpu(scheme: str, tmp_path: Path) -> None:
    source = build("llama", tmp_path / "m")
    for device in ("cpu", "cuda"):
        roundel.quantize(source, tmp_path / device, scheme=scheme, device=device, workers=2)
    assert (tmp_path / "cpu" / "model.safetensors").read_bytes() == (
        tmp_path / "cuda" / "model.safetensors"
    ).read_bytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_triton_multiplies_by_decoded_weights(cell: Cell, dtype: torch.dtype) -> None:
    given = layer_of(cell.scheme, cell.shape), drawn(cell.scheme, cell.shape), dtype
    assert share_of_allowed("triton", *given, device="cuda") <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_triton_multiplies_by_mxfp4(dtype: torch.dtype) -> None:
    for _, layer, quantized in floats("MXFP4"):
        assert share_of_allowed("triton", layer, quantized, dtype, device="cuda") <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("backend", ["marlin", "exllamav2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernels_of_gptqmodel(backend: str, dtype: torch.dtype) -> None:
    if BACKENDS[backend].needs:
        pytest.skip("gptqmodel is not installed")
    for group in (32, 128, -1):
        scheme = integer_scheme(4, group)
        given = layer_of(scheme, (256, 512)), drawn(scheme, (256, 512)), dtype
        assert share_of_allowed(backend, *given, device="cuda") <= 1
