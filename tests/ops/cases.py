"""Weights and grids that every op is tried on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from roundel.scheme import Grid, Scheme

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = ("normal", "positive", "tiny", "negative", "zeros", "outlier", "ties")
SHAPES = ((7, 96), (33, 256), (5, 100), (1, 32))
SCHEMES = (
    "W2A16G32",
    "W3A16",
    "W4A16",
    "W4A16G-1",
    "W5A16G48",
    "W8A16",
    "W4A16_ASYM",
    "W2A16G32_ASYM",
    "W8A16G32_ASYM",
    "MXFP4",
    "MXFP8",
)


def grids() -> dict[str, Grid]:
    found = {name: Scheme.parse(name).weight for name in SCHEMES}
    found |= {f"{name}, zero >= 1": replace(g, lowest_zero=1) for name, g in found.items() if not g.symmetric}
    return found


def weights(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Seeded weights of one kind."""
    generator = torch.Generator().manual_seed(len(kind) * 1000 + shape[0])
    w = torch.randn(shape, generator=generator) * 0.05
    if kind == "positive":
        w = w.abs()
    elif kind == "tiny":
        w = w * 1e-4
        w[0] = 0
    elif kind == "negative":
        w = -w.abs() * 30
    elif kind == "zeros":
        w = w * 0
        w[0, 0] = -0.0
    elif kind == "outlier":
        w[:, ::17] *= 100
    elif kind == "ties":
        w = torch.round(w * 100) / 16
    return w.to(dtype)
