"""The inner loops, written as LLVM vectors, so that no compiler has to find them.

Only instructions that LLVM has for every processor are used; sixteen words of 16 bits, or eight numbers of 32, are one
register of AVX2, two of SSE or NEON. Loops over rows and inputs are unrolled here; loops over columns run. The sum of
products of neighbouring 16-bit numbers (`pairs`) is one instruction of x86, which LLVM knows by its spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from roundel.inference.numba.layout import LAYOUTS, WORD, Layout

__all__ = ["LANES", "STEP", "add_floats", "add_span", "spread_group", "widen"]

LANES = 8  # numbers of 32 bits in a vector
STEP = 16  # columns in a vector of words
_INT = ir.IntType(32)
_INTS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(ir.FloatType(), LANES)
_HALVES, _BYTES = (ir.VectorType(ir.IntType(size), LANES) for size in (16, 8))
_WORDS, _WIDE = (ir.VectorType(ir.IntType(size), STEP) for size in (WORD, 32))
_SIZE = ir.IntType(64)


class _Emitter:
    """The few instructions that the loops are made of."""

    def __init__(self, context: Any, builder: ir.IRBuilder, types_: Sequence[Any], values: Sequence[Any]) -> None:
        self.builder = builder
        self.arguments = [  # arrays as pointers to their first element, numbers as they are
            context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
            for kind, value in zip(types_, values, strict=True)
        ]

    def load(self, pointer: Any, index: Any, kind: ir.VectorType) -> Any:
        """Numbers of an array, from an index on."""
        where = self.builder.bitcast(self.builder.gep(pointer, [index]), kind.as_pointer())
        return self.builder.load(where, align=1)

    def store(self, value: Any, pointer: Any, index: Any) -> None:
        where = self.builder.bitcast(self.builder.gep(pointer, [index]), value.type.as_pointer())
        self.builder.store(value, where, align=1)

    def splat(self, pointer: Any, index: Any, kind: ir.VectorType) -> Any:
        """A number of an array, in all lanes."""
        value = self.builder.load(self.builder.gep(pointer, [index]))
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INT, 0))
        return self.builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), _chosen([0] * LANES))

    def spread(self, pointer: Any, index: Any, kind: ir.VectorType, places: Sequence[int]) -> Any:
        """Eight of the numbers that begin at an index."""
        return self.builder.shuffle_vector(
            self.load(pointer, index, kind), ir.Constant(kind, ir.Undefined), _chosen(places)
        )

    def totals(self, vectors: Sequence[Any]) -> Any:
        """Eight vectors of integers -> one, of their sums, by halving three times within the halves of registers."""
        for size, low, high in ((8, (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)),
                                (4, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)),
                                (2, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))):  # fmt: skip
            assert len(vectors) == size
            vectors = [
                self.builder.add(*(self.builder.shuffle_vector(one, other, _chosen(places)) for places in (low, high)))
                for one, other in zip(vectors[::2], vectors[1::2], strict=True)
            ]
        return vectors[0]

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, rounded once."""
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        name = f"llvm.fma.v{LANES}f32"
        function = self.builder.module.globals.get(name) or ir.Function(self.builder.module, kind, name)
        return self.builder.call(function, [a, b, c])

    def pairs(self, a: Any, b: Any) -> Any:
        """Sixteen signed words each -> eight sums a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1], of 32 bits."""
        products = self.builder.mul(*(self.builder.sext(words, _WIDE) for words in (a, b)))
        nothing = ir.Constant(_WIDE, ir.Undefined)
        even, odd = (self.builder.shuffle_vector(products, nothing, _chosen(range(n, STEP, 2))) for n in (0, 1))
        return self.builder.add(even, odd)

    def size(self, value: int) -> Any:
        return ir.Constant(_SIZE, value)

    def plus(self, index: Any, number: int) -> Any:
        return self.builder.add(index, self.size(number))

    def along(self, start: Any, stride: Any, count: int) -> list[Any]:
        """start, start + stride, ..."""
        return [self.builder.add(start, self.builder.mul(stride, self.size(number))) for number in range(count)]

    def streams(self, layout: Layout, rows: Sequence[int], at: Any, stride: Any) -> dict[int, Any]:
        """Where the streams that these rows lie in begin."""
        begins = self.along(at, stride, layout.streams)
        return {word: begins[word] for word in sorted({take.word for row in rows for take in layout.takes(row)})}

    def row(self, words: Mapping[int, Any], layout: Layout, row: int, e2m1: bool) -> Any:
        """The codes of a row in sixteen columns, as words; twice their values where they are E2M1."""
        found: Any = None
        for take in layout.takes(row):
            part = words[take.word]
            if take.down:
                part = self.builder.lshr(part, _all(_WORDS, take.down))
            if take.down + take.mask.bit_length() < WORD:
                part = self.builder.and_(part, _all(_WORDS, take.mask))
            if take.up:
                part = self.builder.shl(part, _all(_WORDS, take.up))
            found = part if found is None else self.builder.or_(found, part)
        return self.doubled(found) if e2m1 else found

    def doubled(self, codes: Any) -> Any:
        """E2M1 codes -> twice their values: of a magnitude m the largest of m, 2 m - 4 and 4 m - 16."""
        builder = self.builder
        found = size = builder.and_(codes, _all(_WORDS, 7))
        for times, less in ((1, 4), (2, 16)):
            line = builder.sub(builder.shl(size, _all(_WORDS, times)), _all(_WORDS, less))
            found = builder.select(builder.icmp_signed(">", line, found), line, found)
        sign = builder.sub(_all(_WORDS, 0), builder.lshr(codes, _all(_WORDS, 3)))
        return builder.sub(builder.xor(found, sign), sign)

    def halves(self, words: Any) -> list[Any]:
        """Sixteen words -> two vectors of eight floats."""
        undefined = ir.Constant(_WORDS, ir.Undefined)
        found = []
        for first in (0, LANES):
            half = self.builder.shuffle_vector(words, undefined, _chosen(range(first, first + LANES)))
            found.append(self.builder.sitofp(self.builder.sext(half, _INTS), _FLOATS))
        return found

    def widened(self, pointer: Any, index: Any, kind: types.Type) -> Any:
        """Eight stored numbers, by the type of their bits: floats of uint16 (bfloat16), int16 (float16) and uint32
        (float32), integers of uint8."""
        builder = self.builder
        if kind == types.uint8:
            return builder.zext(self.load(pointer, index, _BYTES), _INTS)
        if kind == types.uint32:
            return self.load(pointer, index, _FLOATS)
        bits = builder.zext(self.load(pointer, index, _HALVES), _INTS)
        if kind == types.uint16:
            return builder.bitcast(builder.shl(bits, _all(_INTS, 16)), _FLOATS)
        sign = builder.shl(builder.and_(bits, _all(_INTS, 0x8000)), _all(_INTS, 16))
        rest = builder.shl(builder.and_(bits, _all(_INTS, 0x7FFF)), _all(_INTS, 13))
        size = builder.fmul(builder.bitcast(rest, _FLOATS), _all(_FLOATS, 2.0**112))  # right for subnormals too
        return builder.bitcast(builder.or_(builder.bitcast(size, _INTS), sign), _FLOATS)

    def loop(self, steps: Any, starting: Sequence[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """body(step, values) -> values, `steps` times (maybe never); the values at the end."""
        builder = self.builder
        before = builder.block
        head, inside, after = (builder.append_basic_block(name) for name in ("head", "inside", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        step = builder.phi(_SIZE)
        step.add_incoming(self.size(0), before)
        carried = [builder.phi(value.type) for value in starting]
        for phi, value in zip(carried, starting, strict=True):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", step, steps), inside, after)
        builder.position_at_end(inside)
        results = body(step, list(carried))
        step.add_incoming(self.plus(step, 1), builder.block)
        for phi, value in zip(carried, results, strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return list(carried)


@intrinsic(prefer_literal=True)
def add_span(  # type: ignore[no-untyped-def]
    typing, words, at, stride, steps, x, x_at, x_stride, sums, units, span, scale, zero, total, bits, e2m1, batch
):
    """total[row, input] += scale[row] * units[input] * sum over columns of (code - zero[row]) * x[input].

    words   uint16, flat; from `at` on 16 `steps` columns of the block's first stream, further ones `stride` apart
    x       int16, flat; from `x_at` on the same columns, the next input `x_stride` further
    sums    int32, flat; at `span` the sums of these columns of x, one for each input
    units   float32, flat; at `span` what 1 in x stands for, one for each input
    scale, zero, total   float32, int32 and float32 [rows of a block, batch], flat; the first two one for each row
    bits, e2m1, batch   literal: the width, whether codes are E2M1 and not integers, and 1, 2, 4 or 8 inputs
    Sums are of 32 bits, so columns are few enough: 16 * steps * (2^bits - 1) < 2^16. Arrays that hold one number for a
    row or an input are read in vectors, up to 7 numbers beyond what is used.
    """
    layout, inputs, doubled = LAYOUTS[bits.literal_value], batch.literal_value, e2m1.literal_value
    given = (words, at, stride, steps, x, x_at, x_stride, sums, units, span, scale, zero, total)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        emit = _Emitter(context, builder, signature.args[: len(given)], values[: len(given)])
        words, at, stride, steps, x, x_at, x_stride, sums, units, span, scale, zero, total = emit.arguments
        xs = emit.along(x_at, x_stride, inputs)
        of_row, of_input = [lane // inputs for lane in range(LANES)], [lane % inputs for lane in range(LANES)]
        sum_, unit = emit.spread(sums, span, _INTS, of_input), emit.spread(units, span, _FLOATS, of_input)

        def add_rows(rows: range) -> None:
            streams = emit.streams(layout, rows, at, stride)

            def body(step, so_far):  # type: ignore[no-untyped-def]
                column = builder.mul(step, emit.size(STEP))
                held = {w: emit.load(words, builder.add(begin, column), _WORDS) for w, begin in streams.items()}
                entering = [emit.load(x, builder.add(begin, column), _WORDS) for begin in xs]
                codes = [emit.row(held, layout, row, doubled) for row in rows]
                return [
                    builder.add(value, emit.pairs(codes[of_row[n]], entering[of_input[n]]))
                    for n, value in enumerate(so_far)
                ]

            found = emit.totals(emit.loop(steps, [_all(_INTS, 0)] * LANES, body))
            first = emit.size(rows[0])
            away = builder.mul(emit.spread(zero, first, _INTS, of_row), sum_)
            factor = builder.fmul(emit.spread(scale, first, _FLOATS, of_row), unit)
            where = emit.size(rows[0] * inputs)
            exact = builder.sitofp(builder.sub(found, away), _FLOATS)
            emit.store(emit.fma(factor, exact, emit.load(total, where, _FLOATS)), total, where)

        for rows in layout.parts(LANES // inputs):
            add_rows(rows)
        return context.get_dummy_value()

    return types.void(*given, bits, e2m1, batch), generate


@intrinsic(prefer_literal=True)
def widen(typing, stored, at, out, rows):  # type: ignore[no-untyped-def]
    """out[row] = a stored scale as float32, or a zero point as int32, for the rows of a block.

    stored   flat bits: uint16 (bfloat16), int16 (float16), uint32 (float32), or uint8 for zero points
    rows     literal: a multiple of 8
    """
    given, count, kind = (stored, at, out), rows.literal_value, stored.dtype

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        emit = _Emitter(context, builder, signature.args[: len(given)], values[: len(given)])
        stored, at, out = emit.arguments
        for row in range(0, count, LANES):
            emit.store(emit.widened(stored, emit.plus(at, row), kind), out, emit.size(row))
        return context.get_dummy_value()

    return types.void(*given, rows), generate


@intrinsic(prefer_literal=True)
def spread_group(typing, words, at, stride, steps, scale, zero, out, out_at, out_stride, bits, e2m1):  # type: ignore[no-untyped-def]
    """out[row, column] = (code - zero[row]) * scale[row] for a group's columns; the arguments are `add_span`'s.

    out   float32, flat; the block's first row begins at out_at, the next out_stride further
    """
    layout, doubled = LAYOUTS[bits.literal_value], e2m1.literal_value
    given = (words, at, stride, steps, scale, zero, out, out_at, out_stride)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        emit = _Emitter(context, builder, signature.args[: len(given)], values[: len(given)])
        words, at, stride, steps, scale, zero, out, out_at, out_stride = emit.arguments

        def spread(rows: range) -> None:
            streams = emit.streams(layout, rows, at, stride)
            zeros = {row: builder.sitofp(emit.splat(zero, emit.size(row), _INTS), _FLOATS) for row in rows}
            scales = {row: emit.splat(scale, emit.size(row), _FLOATS) for row in rows}

            def body(step, _):  # type: ignore[no-untyped-def]
                column = builder.mul(step, emit.size(STEP))
                held = {w: emit.load(words, builder.add(begin, column), _WORDS) for w, begin in streams.items()}
                for row in rows:
                    where = builder.add(builder.add(out_at, column), builder.mul(out_stride, emit.size(row)))
                    for half, codes in enumerate(emit.halves(emit.row(held, layout, row, doubled))):
                        value = builder.fmul(builder.fsub(codes, zeros[row]), scales[row])
                        emit.store(value, out, emit.plus(where, half * LANES))
                return []

            emit.loop(steps, [], body)

        for rows in layout.parts(4):
            spread(rows)
        return context.get_dummy_value()

    return types.void(*given, bits, e2m1), generate


@intrinsic(prefer_literal=True)
def add_floats(typing, weights, at, x, x_at, x_stride, steps, total, batch):  # type: ignore[no-untyped-def]
    """total[input] = sum over columns of weight * x[input], lane by lane, for one row of weights of 16 bits.

    weights   flat bits: uint16 for bfloat16, int16 for float16; from `at` on 32 `steps` columns
    x, total  float32, flat; total is [batch, 8]
    batch     literal: how many inputs
    """
    inputs, kind = batch.literal_value, weights.dtype
    given = (weights, at, x, x_at, x_stride, steps, total)
    parts = range(4)  # of 32 columns: sums of their own, for an addition takes a while

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        emit = _Emitter(context, builder, signature.args[: len(given)], values[: len(given)])
        weights, at, x, x_at, x_stride, steps, total = emit.arguments
        xs = emit.along(x_at, x_stride, inputs)

        def body(step, totals):  # type: ignore[no-untyped-def]
            found = []
            for part in parts:
                column = emit.plus(builder.mul(step, emit.size(len(parts) * LANES)), part * LANES)
                weight = emit.widened(weights, builder.add(at, column), kind)
                for each, begin in enumerate(xs):
                    entering = emit.load(x, builder.add(begin, column), _FLOATS)
                    found.append(emit.fma(weight, entering, totals[part * inputs + each]))
            return found

        found = emit.loop(steps, [_all(_FLOATS, 0.0)] * (len(parts) * inputs), body)
        for each in range(inputs):
            one, two, three, four = found[each::inputs]
            emit.store(builder.fadd(builder.fadd(one, two), builder.fadd(three, four)), total, emit.size(each * LANES))
        return context.get_dummy_value()

    return types.void(*given, batch), generate


def _all(kind: ir.VectorType, value: float) -> Any:
    """A constant in all lanes."""
    return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)


def _chosen(places: Sequence[int]) -> Any:
    """Which lanes a shuffle takes."""
    kind = ir.VectorType(_INT, len(places))
    return ir.Constant(kind, [ir.Constant(_INT, place) for place in places])
