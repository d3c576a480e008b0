"""Which kernel multiplies, and in which tiles: by the number of inputs and the matrix' shape alone."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from roundel.inference.triton.kernels import multiply_many, multiply_one
from roundel.inference.triton.layout import LINE, chunk_columns, field_widths

__all__ = ["multiply", "tiles"]

ROWS, CHUNKS, WARPS = 4, 8, 4  # of a program; for one input 4 KB of 4-bit words are asked for at a time
RUN = 4  # steps that tiles take together at most
FEW = 16  # inputs that are one narrow tile


def multiply(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, shape: tuple[int, int], bits: int, group: int, e2m1: bool
) -> Tensor:
    """x [tokens, in] float32, bfloat16 or float16 -> x @ weight.T [tokens, out] in x's dtype.

    words    int32, as layout.py has them
    scales   [out, groups] float16, bfloat16 or float32; uint8 exponents (E8M0)
    zeros    [out, groups] uint8; empty where the zero point is 2^(bits - 1), or codes are E2M1
    group    columns that share a scale
    """
    (out, width), tokens, x = shape, len(x), x.contiguous()
    y = torch.empty((tokens, out), dtype=x.dtype, device=x.device)
    if tokens == 0 or out == 0:
        return y
    chunks = words.shape[1]
    constants, launch = tiles(out, tokens, chunks, bits, group, zeros.numel() > 0, e2m1)
    numbers = (words, scales, zeros, x, y, out, width, chunks, scales.shape[1])
    rows = -(-out // constants["ROWS"])
    with _current(x.device):
        if tokens == 1:
            multiply_one[(rows,)](*numbers, **constants, **launch)
        else:
            multiply_many[(rows, -(-tokens // constants["TOKENS"]))](*numbers, tokens, **constants, **launch)
    return y


def tiles(
    out: int, tokens: int, chunks: int, bits: int, group: int, asymmetric: bool, e2m1: bool
) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants of the kernel, and how it is started. For few inputs programs are small, so that there are enough of
    them; for many they stay within the 99 KB of shared memory that every card since 2020 has."""
    fields, steps, shared = (*field_widths(bits), 0, 0)[:3], chunk_columns(bits) // LINE, group % LINE == 0
    run = math.gcd(group // LINE, steps) if shared else 1
    constants: dict[str, Any] = dict(zip(("HIGH", "NEXT", "LOW"), fields, strict=True))
    constants |= {"E2M1": e2m1, "ASYMMETRIC": asymmetric, "GROUP": group, "SPREAD": 1 if shared else LINE}
    if tokens == 1:
        together = min(CHUNKS, 1 << (chunks - 1).bit_length())
        return constants | {"RUN": run, "ROWS": ROWS, "CHUNKS": together}, {"num_warps": WARPS}
    rows, columns = (16 if out <= 1 << 13 else 32, FEW) if tokens <= FEW else (128, 64)
    stages = 1 if fields[1] else 2  # of several fields, each would be held twice
    constants |= {"RUN": math.gcd(run, RUN), "ROWS": rows, "TOKENS": columns}
    return constants, {"num_warps": WARPS, "num_stages": stages}


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Where kernels are started: on the tensors' device, which may not be the current one."""
    module: Any = getattr(torch, device.type)
    return nullcontext() if device.type == "cpu" else module.device(device)
