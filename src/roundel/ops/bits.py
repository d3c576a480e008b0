"""n-bit codes <-> 32-bit words, in the orders the formats use. Definitions; the fast spellings stand in `ops/numba`.

A row of codes is one little-endian bit stream: code i takes bits i*n .. i*n+n-1 of the row's words, crossing from one
word into the next where n does not divide 32. This is the stream of GPTQ's 3-bit files (words of 10, 1+10, 1+10
codes) and of compressed-tensors' `pack-quantized`; for 2, 4 and 8 bits it is 16, 8 and 4 codes a word, lowest first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from roundel.errors import GridError
from roundel.ops.orders import AWQ_ORDER

__all__ = ["pack_awq", "pack_rows", "pack_stream", "unpack_awq", "unpack_rows", "unpack_stream"]


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """[rows, n] unsigned codes (uint8) -> [rows, n * bits / 32] int32 words. n * bits must fill whole words."""
    rows, count = codes.shape
    if count * bits % 32:
        raise GridError(f"{count} codes of {bits} bits do not fill 32-bit words")
    shifts = torch.arange(bits, device=codes.device, dtype=torch.uint8)
    stream = (codes[:, :, None] >> shifts) & 1  # one bit each, lowest first
    stream = stream.reshape(rows, -1, 32).long()
    words = (stream << torch.arange(32, device=codes.device)).sum(-1)
    return words.to(torch.int32) if words.numel() == 0 else _wrapped(words)


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """[rows, m] int32 words -> [rows, m * 32 / bits] uint8 codes: the inverse of `pack_rows`."""
    if 32 % bits == 0:  # no code lies in two words
        at = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
        return ((words[:, :, None] >> at) & ((1 << bits) - 1)).to(torch.uint8).flatten(1)
    stream = (words[:, :, None] >> torch.arange(32, device=words.device, dtype=torch.int32)) & 1
    stream = stream.reshape(words.shape[0], -1, bits).to(torch.uint8)
    return (stream << torch.arange(bits, device=words.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """`pack_rows` for any number of codes: [rows, n] -> [rows, ceil(n * bits / 32)], the last word filled with
    zeros."""
    words = -(-codes.shape[1] * bits // 32)
    return pack_rows(functional.pad(codes, (0, -codes.shape[1] % (32 // math.gcd(bits, 32)))), bits)[
        :, :words
    ].contiguous()


def unpack_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """[rows, ceil(count * bits / 32)] int32 words -> [rows, count] uint8 codes: the inverse of `pack_stream`."""
    whole = functional.pad(words, (0, -words.shape[1] % (bits // math.gcd(bits, 32))))
    return unpack_rows(whole, bits)[:, :count].contiguous()


def pack_awq(codes: Tensor) -> Tensor:
    """[rows, n] 4-bit codes -> [rows, n / 8] int32 words in AWQ's interleaved order."""
    if codes.shape[1] % 8:
        raise GridError(f"AWQ packs 8 columns a word; {codes.shape[1]} do not divide")
    order = torch.tensor(AWQ_ORDER, device=codes.device)
    return pack_rows(codes.view(codes.shape[0], -1, 8)[:, :, order].flatten(1), 4)


def unpack_awq(words: Tensor) -> Tensor:
    """[rows, m] int32 words -> [rows, 8 m] uint8 codes: the inverse of `pack_awq`."""
    order = torch.tensor(AWQ_ORDER, device=words.device)
    codes = torch.stack([(words >> shift) & 0xF for shift in range(0, 32, 4)], dim=-1).to(torch.uint8)
    return codes[:, :, order.argsort()].flatten(1)


def _wrapped(words: Tensor) -> Tensor:
    """int64 words below 2^32 -> int32 with the same bits."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
