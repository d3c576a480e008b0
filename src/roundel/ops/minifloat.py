"""Rounding to small floats: e2m1 (4 bits), e0m3 (4 bits), e4m3 (8 bits), and reading e8m0 scales. Definitions.

Source: OCP Microscaling Formats specification 1.0, section 5.3; e0m3, quarters with a sign, is what auto-round's MXINT4
stores. Rounding is to nearest, ties to even; values beyond the largest are clamped to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decode_e8m0", "round_e0m3", "round_e2m1", "round_e4m3"]


def round_e2m1(values: Tensor) -> Tensor:
    """float32 -> codes of e2m1, uint8: sign << 3 | index into {0, .5, 1, 1.5, 2, 3, 4, 6}.

    A negative value that rounds to zero keeps its sign (code 8); -0.0 has none (code 0).
    """
    size = values.abs().clamp(max=6.0)
    # Between powers of two the grid is even, so each range is rounded on its own step.
    halves = torch.round(size * 2)  # step .5, up to 2: indices 0..4
    ones = torch.round(size) + 2  # step 1, 2 to 4: indices 4..6
    twos = torch.round(size / 2) + 4  # step 2, 4 to 6: indices 6..7
    index = torch.where(size < 2, halves, torch.where(size < 4, ones, twos)).to(torch.uint8)
    sign = (values < 0).to(torch.uint8) << 3
    return index | sign


def round_e0m3(values: Tensor) -> Tensor:
    """float32 -> codes of e0m3, uint8: sign << 3 | quarters, 0 to 7. Signs of zeros as in `round_e2m1`."""
    quarters = torch.round(values.abs().clamp(max=1.75) * 4).to(torch.uint8)
    return quarters | (values < 0).to(torch.uint8) << 3


def round_e4m3(values: Tensor) -> Tensor:
    """float32 -> float8_e4m3fn, clamped to ±448; -0.0 becomes 0.0, as in `round_e2m1`."""
    return (values.clamp(-448.0, 448.0) + 0.0).to(torch.float8_e4m3fn)


def decode_e8m0(codes: Tensor) -> Tensor:
    """E8M0 bytes -> float32 powers of two, 2^(code - 127). Byte 0 is 2^-127, a subnormal float32."""
    exponents = codes.to(torch.int32) - 127
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
