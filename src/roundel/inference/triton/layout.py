"""How packed weights lie for an accelerator: words of 32 bits, in lines of 32, which are what it reads at a time.

A width is the sum of a few of 8, 4, 2 and 1 (3 = 2 + 1, 6 = 4 + 2). A code is cut into these *fields*, its highest bits
first. A row is cut into *chunks* of 1024 / (narrowest field) columns, zeros after the last; a chunk has 32 columns for
each *step*, and each field of it is one or more lines of 32 words:

    words   int32 [out, chunks, lines, 32], lines of the highest field first
    step j of a chunk, column i of the step: word i of the field's line j // (32 / width), from bit width * (j mod
    (32 / width)) on

Why: a line is 128 bytes of one row, read as one. A shift and a mask by constants take 32 neighbouring columns from it,
so inputs are read side by side too, and a step lies in one group, whose size is a multiple of 32: the scale is applied
once for as many steps as a group has in the chunk.

    4 bits   chunks of 256 columns, one line       8 bits   of 128, one line        2 bits   of 512, one line
    3 bits   of 1024, two lines and one            6 bits   of 512, two lines and one
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LINE", "chunk_columns", "field_widths", "pack_lines"]

LINE = 32  # words in a line, columns in a step, bits in a word


def field_widths(bits: int) -> tuple[int, ...]:
    """Widths of the fields of a code, the highest first."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def chunk_columns(bits: int) -> int:
    """Columns of a chunk."""
    return LINE * LINE // field_widths(bits)[-1]


def pack_lines(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [out, in] uint8 -> words int32 [out, chunks, lines, 32]."""
    (out, width), chunk = codes.shape, chunk_columns(bits)
    steps = torch.nn.functional.pad(codes, (0, -width % chunk)).view(out, -1, chunk // LINE, LINE)
    lines, below = [], bits
    for field in field_widths(bits):
        below -= field
        part, each = (steps >> below) & ((1 << field) - 1), LINE // field
        part = part.view(out, steps.shape[1], -1, each, LINE)
        words = torch.zeros((out, steps.shape[1], part.shape[2], LINE), dtype=torch.int32, device=codes.device)
        for place in range(each):
            words |= part[:, :, :, place].int() << field * place
        lines.append(words)
    return torch.cat(lines, dim=2)
