"""Sixteen float32 side by side as one value that numba knows: what a compiler keeps in vector registers.

A search that runs in one block after the other cannot use vectors where the order of its sums is given; sixteen blocks
in sixteen lanes can, and each keeps its order. Arithmetic and comparisons are those of Python; a float32 beside lanes
counts for all of them. Nothing here is fused or reordered, so a lane holds the bits that scalar code would.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

__all__ = [
    "LANES",
    "choose",
    "every",
    "first_of",
    "highest",
    "largest_of",
    "load",
    "lowest",
    "magnitude",
    "nearest",
    "none",
    "root",
    "store",
    "store_bytes",
    "whole_below",
    "wrapped",
]

LANES = 16


class _Lanes(types.Type):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="Lanes")


class _Mask(types.Type):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="LaneMask")


lanes, mask = _Lanes(), _Mask()
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_BITS = ir.VectorType(ir.IntType(1), LANES)


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: object, type_: object) -> None:
        super().__init__(manager, type_, _FLOATS)


@register_model(_Mask)
class _MaskModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: object, type_: object) -> None:
        super().__init__(manager, type_, _BITS)


def _constant(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * LANES)


def _spread(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, ir.Constant(_FLOATS, ir.Undefined), _constant(_INTS, 0))


def _operand(builder: ir.IRBuilder, kind: types.Type, value: ir.Value) -> ir.Value:
    return value if kind == lanes else _spread(builder, value)


def _operation(instruction: str):  # type: ignore[no-untyped-def]
    """An operator of two lanes, or of lanes and a float32."""

    @intrinsic
    def work(typing_context, left, right):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            a, b = (_operand(builder, *each) for each in zip(signature.args, arguments, strict=True))
            return getattr(builder, instruction)(a, b)

        return lanes(left, right), generate

    return work


def _comparison(symbol: str):  # type: ignore[no-untyped-def]
    @intrinsic
    def work(typing_context, left, right):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            a, b = (_operand(builder, *each) for each in zip(signature.args, arguments, strict=True))
            return (builder.fcmp_unordered if symbol == "!=" else builder.fcmp_ordered)(symbol, a, b)

        return mask(left, right), generate

    return work


def _fits(left: object, right: object) -> bool:
    return lanes in (left, right) and {left, right} <= {lanes, types.float32}


def _define(function: object, work: object) -> None:
    @overload(function)
    def compiled(left, right):  # type: ignore[no-untyped-def]
        if _fits(left, right):
            return lambda left, right: work(left, right)  # type: ignore[operator]
        return None


for _function, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define(_function, _operation(_instruction))
for _function, _symbol in (
    (operator.lt, "<"),
    (operator.gt, ">"),
    (operator.ge, ">="),
    (operator.ne, "!="),
    (operator.eq, "=="),
):
    _define(_function, _comparison(_symbol))


@intrinsic
def _both(typing_context, left, right):  # type: ignore[no-untyped-def]
    return mask(mask, mask), lambda context, builder, signature, arguments: builder.and_(*arguments)


@overload(operator.and_)
def _and(left, right):  # type: ignore[no-untyped-def]
    if left == mask and right == mask:
        return lambda left, right: _both(left, right)
    return None


@intrinsic
def every(typing_context, value):  # type: ignore[no-untyped-def]
    """One float32 in all lanes."""
    return lanes(types.float32), lambda context, builder, signature, arguments: _spread(builder, arguments[0])


def _row(context: Any, builder: Any, array_type: Any, array: Any, index: Any, element: Any) -> Any:
    """A pointer to sixteen elements of a row of a C-contiguous [n, 16] array."""
    struct = context.make_array(array_type)(context, builder, array)
    offset = builder.mul(index, ir.Constant(index.type, LANES))
    return builder.bitcast(builder.gep(struct.data, [offset]), ir.VectorType(element, LANES).as_pointer())


@intrinsic
def load(typing_context, array, row):  # type: ignore[no-untyped-def]
    """A row of a C-contiguous float32 array [n, 16]."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = _row(context, builder, signature.args[0], arguments[0], arguments[1], ir.FloatType())
        return builder.load(pointer, align=4)

    return lanes(array, types.intp), generate


@intrinsic
def store(typing_context, array, row, value):  # type: ignore[no-untyped-def]
    """Lanes into a row of a C-contiguous float32 array [n, 16]."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = _row(context, builder, signature.args[0], arguments[0], arguments[1], ir.FloatType())
        builder.store(arguments[2], pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes), generate


@intrinsic
def store_bytes(typing_context, array, row, value):  # type: ignore[no-untyped-def]
    """Lanes of whole numbers into a row of a C-contiguous uint8 array [n, 16]; -1 becomes 255."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = _row(context, builder, signature.args[0], arguments[0], arguments[1], ir.IntType(8))
        builder.store(builder.trunc(builder.fptosi(arguments[2], _INTS), _BYTES), pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes), generate


@intrinsic
def choose(typing_context, condition, left, right):  # type: ignore[no-untyped-def]
    """Lanes of `left` where the condition holds, else of `right`."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        a, b = (_operand(builder, *each) for each in zip(signature.args[1:], arguments[1:], strict=True))
        return builder.select(arguments[0], a, b)

    return lanes(mask, left, right), generate


@intrinsic
def none(typing_context, condition):  # type: ignore[no-untyped-def]
    """Whether the condition holds in no lane."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        bits = builder.bitcast(arguments[0], ir.IntType(LANES))
        return builder.icmp_unsigned("==", bits, ir.Constant(ir.IntType(LANES), 0))

    return types.boolean(mask), generate


def _unary(name: str):  # type: ignore[no-untyped-def]
    @intrinsic
    def work(typing_context, value):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            type_ = ir.FunctionType(_FLOATS, [_FLOATS])
            function = cgutils.get_or_insert_function(builder.module, type_, f"llvm.{name}.v{LANES}f32")
            return builder.call(function, arguments)

        return lanes(lanes), generate

    return work


nearest, root, magnitude = _unary("nearbyint"), _unary("sqrt"), _unary("fabs")  # nearest whole number, half to even
whole_below = _unary("floor")


def _reduction(name: str):  # type: ignore[no-untyped-def]
    @intrinsic
    def work(typing_context, value):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            type_ = ir.FunctionType(ir.FloatType(), [_FLOATS])
            function = cgutils.get_or_insert_function(builder.module, type_, f"llvm.vector.reduce.{name}.v{LANES}f32")
            return builder.call(function, arguments, fastmath=("nnan", "nsz"))

        return types.float32(lanes), generate

    return work


highest, lowest = _reduction("fmax"), _reduction("fmin")  # over the lanes, which are numbers; of zeros, either


@intrinsic
def first_of(typing_context, condition):  # type: ignore[no-untyped-def]
    """The first lane where the condition holds; 16 where in none."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        bits = builder.zext(builder.bitcast(arguments[0], ir.IntType(LANES)), ir.IntType(64))
        end = ir.Constant(ir.IntType(64), 1 << LANES)
        return builder.cttz(builder.or_(bits, end), ir.Constant(ir.IntType(1), 0))

    return types.intp(mask), generate


@intrinsic
def wrapped(typing_context, value):  # type: ignore[no-untyped-def]
    """`nearest` as ggml computes it, for values that may be out of its range or no numbers."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        shifted = builder.bitcast(builder.fadd(arguments[0], _constant(_FLOATS, 12582912.0)), _INTS)
        low = builder.and_(shifted, _constant(_INTS, 0x7FFFFF))
        return builder.sitofp(builder.sub(low, _constant(_INTS, 0x400000)), _FLOATS)

    return lanes(lanes), generate


@intrinsic
def largest_of(typing_context, left, right):  # type: ignore[no-untyped-def]
    """The larger of two lanes; of what is no number, and of equals, the right."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        a, b = (_operand(builder, *each) for each in zip(signature.args, arguments, strict=True))
        return builder.select(builder.fcmp_ordered(">", a, b), a, b)

    return lanes(left, right), generate
