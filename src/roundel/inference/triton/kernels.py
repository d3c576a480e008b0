"""The kernels: y = x @ weight.T for words of layout.py, the weight never leaving registers.

A field of a word becomes a float without a conversion, which is slow: its bits, where they stand in the word, are laid
into the mantissa of 2^23, and 2^23 is taken off again, exactly. What its place multiplies it by, a power of two, is
undone in the inputs. One input goes by multiply-adds in float32; many go by `tl.dot` with codes less their zero points,
which bfloat16 and float16 hold exactly, in the inputs' dtype, and scales are applied to sums in float32. E2M1 codes are
laid where float32 has its exponent.

Everything that loops unroll by is a constant; nothing is tried out at run time, and sums are always added in one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["multiply_many", "multiply_one"]

MAGIC = tl.constexpr(0x4B000000)  # 2^23
FULL = tl.constexpr(2.0**126)  # of what E2M1 codes laid into an exponent are too small
HALF = tl.constexpr(2.0**63)  # inputs make up for one half of it, and scales for the other


@triton.jit
def _placed(words, step: tl.constexpr, width: tl.constexpr):
    """(field of a step times a power of two, the inverse of that power): float32 like words, exactly."""
    field: tl.constexpr = step % (32 // width)
    run: tl.constexpr = field // (23 // width) * (23 // width)  # its first field, after a shift
    up: tl.constexpr = width * (field - run)
    mask: tl.constexpr = ((1 << width) - 1) << up
    laid = ((words >> width * run) & mask) | MAGIC
    return laid.to(tl.float32, bitcast=True) - 8388608.0, 1.0 / (1 << up)


@triton.jit
def _e2m1(words):
    """E2M1 codes in the lowest bits, 2^126 times too small."""
    laid = ((words & 7) << 22) | ((words & 8) << 28)
    return laid.to(tl.float32, bitcast=True)


@triton.jit
def _scale(scales, at, mask):
    """Stored scales -> float32; those of 8 bits are exponents (E8M0)."""
    if scales.dtype.element_ty == tl.uint8:
        exponent = tl.load(scales + at, mask, other=0).to(tl.int32)
        return tl.where(exponent == 0, 0x00400000, exponent << 23).to(tl.float32, bitcast=True)
    return tl.load(scales + at, mask, other=0).to(tl.float32)


@triton.jit
def multiply_one(
    words, scales, zeros, x, y, out, width, chunks, groups,
    HIGH: tl.constexpr, NEXT: tl.constexpr, LOW: tl.constexpr, E2M1: tl.constexpr, ASYMMETRIC: tl.constexpr,
    GROUP: tl.constexpr, RUN: tl.constexpr, SPREAD: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One input: x [in] -> y [out]. A program has some rows, and goes along them some chunks at a time.

    HIGH, NEXT, LOW   widths of a code's fields, 0 for one that it has not; the last is the narrowest
    GROUP, RUN        columns that share a scale, and steps of a chunk in a row that do
    SPREAD            1, or 32 where columns of a step lie in several groups
    """
    narrow: tl.constexpr = LOW if LOW else (NEXT if NEXT else HIGH)
    lines: tl.constexpr = (HIGH + NEXT + LOW) // narrow
    steps: tl.constexpr = 32 // narrow
    middle: tl.constexpr = 1 << (HIGH + NEXT + LOW - 1)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    chunk = tl.arange(0, CHUNKS)[None, :, None]
    lane, apart = tl.arange(0, 32)[None, None, :], tl.arange(0, SPREAD)[None, None, :]
    total = tl.zeros([ROWS, CHUNKS, 32], tl.float32)
    for first in range(0, chunks, CHUNKS):
        here = first + chunk
        known = (rows < out) & (here < chunks)
        at = words + (rows * chunks + here) * (lines * 32) + lane
        for begin in tl.static_range(0, steps, RUN):
            found = tl.zeros([ROWS, CHUNKS, 32], tl.float32)
            entering = tl.zeros([ROWS, CHUNKS, 32], tl.float32)
            for step in tl.static_range(begin, begin + RUN):
                column = tl.broadcast_to((here * steps + step) * 32 + lane, [ROWS, CHUNKS, 32])  # laid out like words
                value = tl.load(x + column, column < width, other=0).to(tl.float32)
                if E2M1:
                    held = tl.load(at, known, other=0)
                    found += _e2m1(held >> 4 * step) * (value * HALF)
                else:
                    held = tl.load(at + step // (32 // HIGH) * 32, known, other=0)
                    code, down = _placed(held, step, HIGH)
                    found += code * (value * (down * (1 << (NEXT + LOW))))
                    if NEXT:
                        held = tl.load(at + (HIGH // narrow + step // (32 // NEXT)) * 32, known, other=0)
                        code, down = _placed(held, step, NEXT)
                        found += code * (value * (down * (1 << LOW)))
                    if LOW:
                        held = tl.load(at + ((HIGH + NEXT) // narrow + step // (32 // LOW)) * 32, known, other=0)
                        code, down = _placed(held, step, LOW)
                        found += code * (value * down)
                entering += value
            group = ((here * steps + begin) * 32 + apart) // GROUP
            inside = (rows < out) & (group < groups)
            scale = _scale(scales, rows * groups + group, inside)
            if E2M1:
                total += (scale * HALF) * found
            elif ASYMMETRIC:
                zero = tl.load(zeros + rows * groups + group, inside, other=0).to(tl.float32)
                total += scale * (found - zero * entering)
            else:
                total += scale * (found - middle * entering)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(y + row, tl.sum(tl.sum(total, 2), 1).to(y.dtype.element_ty), row < out)


@triton.jit
def _code(at, mask, step, width: tl.constexpr, lines: tl.constexpr):
    """The field of a step, float32: lines of it begin at `at`."""
    each: tl.constexpr = 32 // width
    if lines > 1:
        at += step // each * 32
    laid = ((tl.load(at, mask, other=0) >> (step % each * width)) & ((1 << width) - 1)) | MAGIC
    return laid.to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def multiply_many(
    words, scales, zeros, x, y, out, width, chunks, groups, tokens,
    HIGH: tl.constexpr, NEXT: tl.constexpr, LOW: tl.constexpr, E2M1: tl.constexpr, ASYMMETRIC: tl.constexpr,
    GROUP: tl.constexpr, RUN: tl.constexpr, SPREAD: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Many inputs: x [tokens, in] -> y [tokens, out], a tile of [ROWS, TOKENS] each program; as `multiply_one`.

    Weights are the first operand of the product, for registers may hold that one.
    """
    narrow: tl.constexpr = LOW if LOW else (NEXT if NEXT else HIGH)
    lines: tl.constexpr = (HIGH + NEXT + LOW) // narrow
    steps: tl.constexpr = 32 // narrow
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[None, :]
    lane, apart = tl.arange(0, 32), tl.arange(0, SPREAD)[None, :]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for run in range(chunks * (steps // RUN)):
        chunk, begin = run // (steps // RUN), run % (steps // RUN) * RUN
        at = words + (rows * chunks + chunk) * (lines * 32) + lane[None, :]
        group = (run * (RUN * 32) + apart) // GROUP
        inside = (rows < out) & (group < groups)
        scale = _scale(scales, rows * groups + group, inside)
        zero = tl.full([ROWS, SPREAD], 1 << (HIGH + NEXT + LOW - 1), tl.float32)
        if ASYMMETRIC:
            zero = tl.load(zeros + rows * groups + group, inside, other=0).to(tl.float32)
        found = tl.zeros([ROWS, TOKENS], tl.float32)
        for part in tl.static_range(RUN):
            step = begin + part
            if E2M1:
                code = _e2m1(tl.load(at, rows < out, other=0) >> (4 * step)) * FULL
            else:
                code = _code(at, rows < out, step, HIGH, HIGH // narrow) * (1 << (NEXT + LOW)) - zero
                if NEXT:
                    code += _code(at + HIGH // narrow * 32, rows < out, step, NEXT, NEXT // narrow) * (1 << LOW)
                if LOW:
                    code += _code(at + (HIGH + NEXT) // narrow * 32, rows < out, step, LOW, LOW // narrow)
            column = ((run * RUN + part) * 32 + lane)[:, None]
            value = tl.load(x + token * width + column, (column < width) & (token < tokens), other=0)
            if SPREAD == 1:
                found = tl.dot(code.to(value.dtype), value, found, input_precision="ieee")
            else:
                found = tl.dot(code * scale, value.to(tl.float32), found, input_precision="ieee")
        total += found * scale if SPREAD == 1 else found
    tl.store(y + token * out + rows, total.to(y.dtype.element_ty), (rows < out) & (token < tokens))
