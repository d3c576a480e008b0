"""Threads that look for work in compiled code, for pieces of work that last less than waking a thread does.

A token takes a hundred products, each a fraction of a millisecond, with Python in between. The threads of a *team* wait
by looking at a number in memory; only where nothing came for some milliseconds do they sleep. Who has work publishes it
(a compiled function, the address of its arguments, rows) and takes parts of it like everybody else, so work is done
even if no other thread ever comes.

The *ticket* is the number that all look at: in its upper half which work this is, in its lower half how many parts of
it nobody has taken. A part is taken by lowering it with compare-and-swap, which fails where another was faster or the
work is another one by now. What describes the work is written before its ticket, and only when all parts of the work
before it are done, so who holds a part has read the description that belongs to it.
"""

from __future__ import annotations

import atexit
import os
import threading
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import nn

from roundel.inference.numba.layout import FEW
from roundel.ops.numba.compiling import jit

__all__ = ["PART", "pointer_to", "share_parts", "spare_processors"]

PART = types.void(types.int64, types.int64, types.int64)  # address of arguments, first row, row after the last
PARTS_A_THREAD = 4  # so that who comes late leaves little to wait for
WEIGHTS_A_PART = 1 << 15  # fewer are not worth taking
LOOKS = 100_000  # some milliseconds
LINE = 8  # numbers in a cache line: what different threads write lies that far apart
TICKET, DONE, SLEEPING, ENDING, WORK = (LINE * place for place in range(5))
FUNCTION, ARGUMENTS, ROWS, STEP = range(WORK, WORK + 4)
HALF = 32


def share_parts(function: int, arguments: np.ndarray, rows: int, weights: int) -> None:
    """Run the compiled `function` (the address of a `PART`) over all rows, in as many threads as torch uses if there is
    enough of it."""
    threads, parts = _threads(), min(rows, weights // WEIGHTS_A_PART)
    if threads == 1 or parts < 2 or not _team(threads, os.getpid()).run(function, arguments, rows, parts):
        _alone(function, arguments, rows)


def spare_processors(model: nn.Module) -> None:
    """While a model whose every matrix is multiplied by teams reads a few tokens, torch works in one thread.

    Its threads wait by spinning, on the processors that a team needs, and what is left to them is too little to share.
    A thread that first uses torch meanwhile begins with one too, and keeps it: torch knows no other way to say it.
    """
    model.register_forward_pre_hook(_take_threads, with_kwargs=True)
    model.register_forward_hook(_give_threads, always_call=True)


_taken = threading.local()  # .threads: that torch had, while it works in one


def _threads() -> int:
    return getattr(_taken, "threads", 0) or torch.get_num_threads()


def _take_threads(model: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    ids = named.get("input_ids", given[0] if given else None)
    threads = torch.get_num_threads()
    if threads > 1 and isinstance(ids, torch.Tensor) and ids.numel() <= FEW:
        _taken.threads = threads
        torch.set_num_threads(1)


def _give_threads(model: nn.Module, *_: Any) -> None:
    threads = getattr(_taken, "threads", 0)
    if threads:
        _taken.threads = 0
        torch.set_num_threads(threads)


class _Team:
    """One who has work, at a time, and helpers."""

    def __init__(self, helpers: int) -> None:
        self._state = np.zeros(WORK + LINE, np.int64)
        self._parts = (helpers + 1) * PARTS_A_THREAD
        self._busy, self._wake = threading.Lock(), threading.Semaphore(0)
        self._helpers = [threading.Thread(target=self._help, daemon=True, name="rows") for _ in range(helpers)]
        atexit.register(self._end)
        for helper in self._helpers:
            helper.start()

    def run(self, function: int, arguments: np.ndarray, rows: int, parts: int) -> bool:
        """False where another thread's work is under way."""
        if not self._busy.acquire(blocking=False):
            return False
        try:
            sleeping = int(self._state[SLEEPING])
            if sleeping:
                _add(self._state, SLEEPING, -sleeping)
                self._wake.release(sleeping)
            _lead(self._state, function, arguments, rows, -(-rows // min(parts, self._parts)))
        finally:
            self._busy.release()
        return True

    def _help(self) -> None:
        while not _help(self._state, LOOKS):
            self._wake.acquire()

    def _end(self) -> None:
        """Before the interpreter goes: threads in compiled code would outlive what they look at."""
        _add(self._state, ENDING, 1)
        self._wake.release(len(self._helpers))
        for helper in self._helpers:
            helper.join()


@cache
def _team(threads: int, process: int) -> _Team:
    """process   a forked one has none of its parent's threads"""
    return _Team(threads - 1)


@jit
def _lead(state, function, arguments, rows, step):  # type: ignore[no-untyped-def]
    parts = (rows + step - 1) // step
    state[FUNCTION], state[ARGUMENTS], state[ROWS], state[STEP] = function, arguments.ctypes.data, rows, step
    _write(state, DONE, 0)
    _write(state, TICKET, (((_read(state, TICKET) >> HALF) + 1) << HALF) + parts)
    while _take(state):
        pass
    while _read(state, DONE) < parts:
        pass


@jit
def _help(state, looks):  # type: ignore[no-untyped-def]
    """Whether the team ends; else nothing came for so many looks, and this thread counts as sleeping."""
    left = looks
    while left > 0:
        if _read(state, ENDING):
            return True
        left = looks if _take(state) else left - 1
    _add(state, SLEEPING, 1)
    return False


@jit
def _take(state):  # type: ignore[no-untyped-def]
    """Do a part that nobody has taken; whether there was one, or may be."""
    ticket = _read(state, TICKET)
    part = (ticket & ((1 << HALF) - 1)) - 1
    if part < 0:
        return False
    function, arguments, rows, step = state[FUNCTION], state[ARGUMENTS], state[ROWS], state[STEP]
    if _swap(state, TICKET, ticket, ticket - 1):
        _call(function, arguments, part * step, min(rows, (part + 1) * step))
        _add(state, DONE, 1)
    return True


@jit
def _alone(function, arguments, rows):  # type: ignore[no-untyped-def]
    _call(function, arguments.ctypes.data, 0, rows)


def _place(context: Any, builder: ir.IRBuilder, kind: types.Array, values: Any) -> Any:
    """Where state[index] lies."""
    return builder.gep(context.make_array(kind)(context, builder, values[0]).data, [values[1]])


@intrinsic
def _read(typing, state, index):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return builder.load_atomic(_place(context, builder, signature.args[0], values), "seq_cst", 8)

    return types.int64(state, types.intp), generate


@intrinsic
def _write(typing, state, index, value):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        builder.store_atomic(values[2], _place(context, builder, signature.args[0], values), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(state, types.intp, types.int64), generate


@intrinsic
def _swap(typing, state, index, expected, value):  # type: ignore[no-untyped-def]
    """Write value where it is what was expected; whether it was."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        where = _place(context, builder, signature.args[0], values)
        return builder.extract_value(builder.cmpxchg(where, values[2], values[3], "seq_cst", "seq_cst"), 1)

    return types.boolean(state, types.intp, types.int64, types.int64), generate


@intrinsic
def _increase(typing, state, index, value):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        builder.atomic_rmw("add", _place(context, builder, signature.args[0], values), values[2], "seq_cst")
        return context.get_dummy_value()

    return types.void(state, types.intp, types.int64), generate


@jit
def _add(state, index, value):  # type: ignore[no-untyped-def]
    _increase(state, index, value)


@intrinsic
def _call(typing, function, arguments, begin, end):  # type: ignore[no-untyped-def]
    """Call a PART by its address."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        number = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [number] * 3)
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def pointer_to(typing, address, kind):  # type: ignore[no-untyped-def]
    """What lies at an address, of a kind (a numpy type, or numba's for a record), for `numba.carray`."""
    pointer = types.CPointer(kind.instance_type)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return builder.inttoptr(values[0], context.get_value_type(pointer))

    return pointer(types.int64, kind), generate
