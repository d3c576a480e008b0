"""The inner loops, written as LLVM vectors of eight numbers, so that no compiler has to find them.

Only instructions that LLVM has for every processor are used (and, shift, convert, multiply-add); eight floats are one
register of AVX2, two of SSE or NEON. Loops over rows and inputs are unrolled here; loops over columns run.

A word holds a column's codes of several rows (layout.py); shifted down and masked they are the integers that are
multiplied. The sum of a group is multiplied by its scale once, as a vector of partial sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from roundel.inference.numba.layout import LAYOUTS, Layout

__all__ = ["add_floats", "add_group", "spread_group", "widen"]

LANES = 8
SUMS = 10  # vectors that are summed up at a time: registers hold so many beside what enters
_INT = ir.IntType(32)
_INTS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(ir.FloatType(), LANES)
_HALVES, _BYTES = (ir.VectorType(ir.IntType(size), LANES) for size in (16, 8))
_SIZE = ir.IntType(64)


class _Emitter:
    """The few instructions that the loops are made of."""

    def __init__(self, context: Any, builder: ir.IRBuilder, types_: Sequence[Any], values: Sequence[Any]) -> None:
        self.builder = builder
        self._values = [
            context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
            for kind, value in zip(types_, values, strict=True)
        ]

    def arguments(self) -> list[Any]:
        """Arrays as pointers to their first element, numbers as they are."""
        return self._values

    def at(self, pointer: Any, index: Any, kind: ir.VectorType) -> Any:
        """Eight numbers of an array, from an index on, as something to load or store."""
        where = self.builder.gep(pointer, [index])
        return self.builder.bitcast(where, kind.as_pointer())

    def load(self, pointer: Any, index: Any, kind: ir.VectorType) -> Any:
        return self.builder.load(self.at(pointer, index, kind), align=kind.element.width // 8 if _is_int(kind) else 4)

    def store(self, value: Any, pointer: Any, index: Any) -> None:
        self.builder.store(value, self.at(pointer, index, _FLOATS), align=4)

    def splat(self, value: Any, kind: ir.VectorType) -> Any:
        """One number in all lanes."""
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INT, 0))
        return self.builder.shuffle_vector(
            one, ir.Constant(kind, ir.Undefined), ir.Constant(_INTS, [ir.Constant(_INT, 0)] * LANES)
        )

    def scalar(self, pointer: Any, index: Any) -> Any:
        """A number of an array, in all lanes."""
        return self.splat(self.builder.load(self.builder.gep(pointer, [index])), _FLOATS)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, rounded once."""
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        name = f"llvm.fma.v{LANES}f32"
        function = self.builder.module.globals.get(name) or ir.Function(self.builder.module, kind, name)
        return self.builder.call(function, [a, b, c])

    def ints(self, value: int) -> Any:
        return ir.Constant(_INTS, [ir.Constant(_INT, value)] * LANES)

    def floats(self, value: float) -> Any:
        return ir.Constant(_FLOATS, [ir.Constant(ir.FloatType(), value)] * LANES)

    def size(self, value: int) -> Any:
        return ir.Constant(_SIZE, value)

    def plus(self, index: Any, number: int) -> Any:
        return self.builder.add(index, self.size(number))

    def streams(self, layout: Layout, rows: Sequence[int], at: Any, stride: Any) -> dict[int, Any]:
        """Where the streams that these rows lie in begin."""
        needed = sorted({take.word for row in rows for take in layout.takes(row)})
        return {word: self.builder.add(at, self.builder.mul(stride, self.size(word))) for word in needed}

    def row(self, words: Mapping[int, Any], layout: Layout, row: int) -> Any:
        """The codes of a row, as floats."""
        found: Any = None
        for take in layout.takes(row):
            part = words[take.word]
            if take.down:
                part = self.builder.lshr(part, self.ints(take.down))
            if take.down + take.mask.bit_length() < 32:
                part = self.builder.and_(part, self.ints(take.mask))
            if take.up:
                part = self.builder.shl(part, self.ints(take.up))
            found = part if found is None else self.builder.or_(found, part)
        return self.builder.sitofp(found, _FLOATS)

    def widened(self, pointer: Any, index: Any, kind: types.Type) -> Any:
        """Eight stored numbers as floats, by the type of their bits: uint16 bfloat16, int16 float16, uint32 float32."""
        builder = self.builder
        if kind == types.uint32:
            return builder.bitcast(self.load(pointer, index, _INTS), _FLOATS)
        if kind == types.uint8:
            return builder.uitofp(self.load(pointer, index, _BYTES), _FLOATS)
        bits = builder.zext(self.load(pointer, index, _HALVES), _INTS)
        if kind == types.uint16:
            return builder.bitcast(builder.shl(bits, self.ints(16)), _FLOATS)
        sign = builder.shl(builder.and_(bits, self.ints(0x8000)), self.ints(16))
        rest = builder.shl(builder.and_(bits, self.ints(0x7FFF)), self.ints(13))
        size = builder.fmul(builder.bitcast(rest, _FLOATS), self.floats(2.0**112))  # right for subnormals too
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
def add_group(  # type: ignore[no-untyped-def]
    typing, words, at, stride, x, x_at, x_stride, steps, sums, sums_at, sums_stride, scale, zero, total, bits, batch
):
    """total[row, input] += scale[row] * (sum over a group's columns of (code - zero[row]) * x[input]), lane by lane.

    words   uint32, flat; from `at` on 8 `steps` columns of the block's first stream, further ones `stride` apart
    x       float32, flat; from `x_at` on the same columns, the next input `x_stride` further
    sums    float32, flat; from `sums_at` on eight sums of these columns of x, the next input's `sums_stride` further
    scale, zero   float32, one for each row of the block; total is float32 [rows of a block, batch, 8], flat
    bits, batch   literal: the width, and how many inputs
    """
    layout, inputs = LAYOUTS[bits.literal_value], batch.literal_value
    given = (words, at, stride, x, x_at, x_stride, steps, sums, sums_at, sums_stride, scale, zero, total)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        emit = _Emitter(context, builder, signature.args[: len(given)], values[: len(given)])
        words, at, stride, x, x_at, x_stride, steps, sums, sums_at, sums_stride, scale, zero, total = emit.arguments()
        xs = [builder.add(x_at, builder.mul(x_stride, emit.size(each))) for each in range(inputs)]
        sum_at = [builder.add(sums_at, builder.mul(sums_stride, emit.size(each))) for each in range(inputs)]

        def add_rows(rows: range) -> None:
            streams = emit.streams(layout, rows, at, stride)
            starting = []
            for row in rows:
                away = builder.fneg(emit.scalar(zero, emit.size(row)))
                starting += [builder.fmul(away, emit.load(sums, place, _FLOATS)) for place in sum_at]

            def body(step, totals):  # type: ignore[no-untyped-def]
                column = builder.mul(step, emit.size(LANES))
                held = {w: emit.load(words, builder.add(begin, column), _INTS) for w, begin in streams.items()}
                entering = [emit.load(x, builder.add(begin, column), _FLOATS) for begin in xs]
                codes = [emit.row(held, layout, row) for row in rows]
                return [emit.fma(codes[n // inputs], entering[n % inputs], so_far) for n, so_far in enumerate(totals)]

            found = emit.loop(steps, starting, body)
            for place, value in enumerate(found):
                row, each = rows[place // inputs], place % inputs
                where = emit.size((row * inputs + each) * LANES)
                factor = emit.scalar(scale, emit.size(row))
                emit.store(emit.fma(factor, value, emit.load(total, where, _FLOATS)), total, where)

        for rows in layout.parts(SUMS // inputs):
            add_rows(rows)
        return context.get_dummy_value()

    return types.void(*given, bits, batch), generate


@intrinsic(prefer_literal=True)
def widen(typing, stored, at, out, rows):  # type: ignore[no-untyped-def]
    """out[row] = a stored scale or zero point as float32, for the rows of a block.

    stored   flat bits: uint16 (bfloat16), int16 (float16), uint32 (float32) or uint8 (a whole number)
    rows     literal: a multiple of 8
    """
    given, count, kind = (stored, at, out), rows.literal_value, stored.dtype

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        emit = _Emitter(context, builder, signature.args[: len(given)], values[: len(given)])
        stored, at, out = emit.arguments()
        for row in range(0, count, LANES):
            emit.store(emit.widened(stored, emit.plus(at, row), kind), out, emit.size(row))
        return context.get_dummy_value()

    return types.void(*given, rows), generate


@intrinsic(prefer_literal=True)
def spread_group(typing, words, at, stride, steps, scale, zero, out, out_at, out_stride, bits):  # type: ignore[no-untyped-def]
    """out[row, column] = (code - zero[row]) * scale[row] for a group's columns; the arguments are `add_group`'s.

    out   float32, flat; the block's first row begins at out_at, the next out_stride further
    """
    layout = LAYOUTS[bits.literal_value]
    given = (words, at, stride, steps, scale, zero, out, out_at, out_stride)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        emit = _Emitter(context, builder, signature.args[: len(given)], values[: len(given)])
        words, at, stride, steps, scale, zero, out, out_at, out_stride = emit.arguments()

        def spread(rows: range) -> None:
            streams = emit.streams(layout, rows, at, stride)
            factors = {row: [emit.scalar(part, emit.size(row)) for part in (zero, scale)] for row in rows}

            def body(step, _):  # type: ignore[no-untyped-def]
                column = builder.mul(step, emit.size(LANES))
                held = {w: emit.load(words, builder.add(begin, column), _INTS) for w, begin in streams.items()}
                for row, (away, factor) in factors.items():
                    where = builder.add(builder.add(out_at, column), builder.mul(out_stride, emit.size(row)))
                    emit.store(builder.fmul(builder.fsub(emit.row(held, layout, row), away), factor), out, where)
                return []

            emit.loop(steps, [], body)

        for rows in layout.parts(SUMS):
            spread(rows)
        return context.get_dummy_value()

    return types.void(*given, bits), generate


@intrinsic(prefer_literal=True)
def add_floats(typing, weights, at, x, x_at, x_stride, steps, total, batch):  # type: ignore[no-untyped-def]
    """total[input] = sum over columns of weight * x[input], lane by lane, for one row of weights of 16 bits.

    weights   flat bits: uint16 for bfloat16, int16 for float16; from `at` on 32 `steps` columns
    total     float32 [batch, 8], flat
    batch     literal: how many inputs
    """
    inputs, weights_kind = batch.literal_value, weights.dtype
    given = (weights, at, x, x_at, x_stride, steps, total)
    parts = range(4)  # of 32 columns: sums of their own, for an addition takes a while

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        emit = _Emitter(context, builder, signature.args[: len(given)], values[: len(given)])
        weights, at, x, x_at, x_stride, steps, total = emit.arguments()
        xs = [builder.add(x_at, builder.mul(x_stride, emit.size(each))) for each in range(inputs)]

        def body(step, totals):  # type: ignore[no-untyped-def]
            found = []
            for part in parts:
                column = emit.plus(builder.mul(step, emit.size(len(parts) * LANES)), part * LANES)
                weight = emit.widened(weights, builder.add(at, column), weights_kind)
                for each, begin in enumerate(xs):
                    entering = emit.load(x, builder.add(begin, column), _FLOATS)
                    found.append(emit.fma(weight, entering, totals[part * inputs + each]))
            return found

        found = emit.loop(steps, [emit.floats(0.0)] * (len(parts) * inputs), body)
        for each in range(inputs):
            one, two, three, four = found[each::inputs]
            emit.store(builder.fadd(builder.fadd(one, two), builder.fadd(three, four)), total, emit.size(each * LANES))
        return context.get_dummy_value()

    return types.void(*given, batch), generate


def _is_int(kind: ir.VectorType) -> bool:
    return isinstance(kind.element, ir.IntType)
