"""One pass from stored bytes to packed bytes: plain rounding and packing, a slab of rows at a time.

Its definition is the composition it replaces, `format.pack(layer, rtn.quantize(layer))`, and it is tested bit for bit
against it. It needs no torch and holds no float matrix: memory is the packed layer and one slab of stored rows.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from roundel.algorithms import Algorithm, Rtn
from roundel.errors import NumericsError
from roundel.formats import Format, WordLayout
from roundel.formats.mxfp import mx_outputs
from roundel.ops import use_kernels
from roundel.ops.orders import AWQ_ORDER
from roundel.tensor import ITEMSIZE
from roundel.unit import Layer

__all__ = ["SLAB_BYTES", "Errors", "fuses", "goes_by_rows", "not_finite", "round_and_pack", "slab_rows"]

SLAB_BYTES = 2 << 20  # of stored weights: small enough for the cache that two cores share
ROW_STEP = 128  # rows of a slab are a multiple of it, so that packed words and cache lines are whole


Read = Callable[[int, np.ndarray], None]


class _Scratch(threading.local):
    """Buffers that a thread uses again for every layer: fresh pages cost as much as the rounding."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def array(self, name: str, shape: tuple[int, int], dtype: type[np.generic]) -> np.ndarray:
        """An array over the buffer of that name, its content undefined."""
        nbytes = shape[0] * shape[1] * np.dtype(dtype).itemsize
        if self._buffers.get(name, np.empty(0, np.uint8)).nbytes < nbytes:
            self._buffers[name] = np.empty(nbytes, np.uint8)
        return self._buffers[name][:nbytes].view(dtype).reshape(shape)


_scratch = _Scratch()


@dataclass(frozen=True)
class Errors:
    """Sums over a layer's weights: of squares, and of squared rounding errors."""

    signal: float
    noise: float

    def plus(self, other: Errors) -> Errors:
        """Of the weights of both."""
        return Errors(self.signal + other.signal, self.noise + other.noise)

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise, in decibel; infinite where nothing was lost."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


def fuses(layer: Layer, formats: Sequence[Format], algorithm: Algorithm, device: str = "cpu") -> bool:
    """Whether a layer can go this way: stored plain and whole rows, rounded plainly, one format, on CPU."""
    piece = layer.stored.parts.get("weight")
    if layer.stored.format != "plain" or layer.stored.cut is not None or piece is None:
        return False
    if piece.transposed or piece.step != 1:
        return False
    if len(formats) != 1 or not isinstance(algorithm, Rtn) or device != "cpu" or not use_kernels():
        return False
    if layer.dtype not in ("BF16", "F16", "F32") or layer.scheme.weight.rule != "range":
        return False
    layout = formats[0].words(layer)
    if layout is None:
        grid = layer.scheme.weight
        return grid.is_mx and grid.exponent == "floor" and formats[0].outputs(layer) == mx_outputs(layer)
    return layout.order == "awq" or layer.shape[1] % 32 == 0


def goes_by_rows(layer: Layer, formats: Sequence[Format], algorithm: Algorithm, device: str = "cpu") -> bool:
    """Whether a layer is rounded and packed a slab of rows at a time, through torch: it is stored plain, ggml's types
    round each row by itself, and the formats pack it so."""
    piece = layer.stored.parts.get("weight")
    if layer.stored.format != "plain" or piece is None or not piece.in_rows or layer.cut is not None or device != "cpu":
        return False
    rows = isinstance(algorithm, Rtn) and layer.scheme.weight.rule == "ggml"
    return rows and all(format.packs_rows for format in formats)


def slab_rows(layer: Layer) -> int:
    """Rows of a slab."""
    row_bytes = layer.shape[1] * ITEMSIZE[layer.dtype]
    return max(ROW_STEP, SLAB_BYTES // row_bytes // ROW_STEP * ROW_STEP)


def round_and_pack(layer: Layer, format: Format, read: Read) -> tuple[dict[str, np.ndarray], Errors]:
    """A layer's packed parts, and what rounding cost.

    read   fills a uint8 buffer with stored bytes, from a row on
    The arrays are the calling thread's own and hold until its next call.
    Raises NumericsError naming the layer and the first weight that is not finite.
    """
    layout = format.words(layer)
    return _mx(layer, read) if layout is None else _words(layer, layout, read)


def not_finite(layer: Layer, row: int, column: int, value: float) -> NumericsError:
    """The error for a weight that cannot be rounded."""
    what = f"is {value}" if not math.isfinite(value) else f"is {value}, beyond what a float16 scale can reach"
    reason = f"weight [{row}, {column}] {what}"
    return NumericsError(
        f"{layer.name} {list(layer.shape)}: {reason}. It has no nearest code. Mend the checkpoint, or keep this layer "
        f"in full precision with --ignore-layers {layer.name}.",
        reason,
    )


def _stored_rows(layer: Layer, read: Read, start: int, count: int) -> np.ndarray:
    from roundel.ops.numba.stored import BF16, F16, F32

    stored = _scratch.array("stored", (count, layer.shape[1]), {"BF16": BF16, "F16": F16, "F32": F32}[layer.dtype])
    read(start, stored.reshape(-1).view(np.uint8))
    return stored


def _words(layer: Layer, layout: WordLayout, read: Read) -> tuple[dict[str, np.ndarray], Errors]:
    from roundel.ops.numba.packing import pack_awq_columns, pack_columns
    from roundel.ops.numba.rounding import round_integer

    grid, bits, (out, width) = layer.scheme.weight, layer.scheme.bits, layer.shape
    group, groups = grid.block_of(layer.shape)[1], grid.blocks(layer.shape)[1]
    rows = slab_rows(layer)
    codes = _scratch.array("codes", (min(rows, out), width), np.uint8)
    scales = _scratch.array("scales", (out, groups), np.uint16)
    zeros = _scratch.array("zeros", (out, groups), np.uint8)
    shape = {"gptq": (width * bits // 32, out), "awq": (width, out // 8), "rows": (out, width * bits // 32)}
    words = _scratch.array("words", shape[layout.order], np.uint32)
    if layout.order == "rows":
        turned = _scratch.array("turned", (width * bits // 32, min(rows, out)), np.uint32)
    sums = np.zeros(2)
    for start in range(0, out, rows):
        stored = _stored_rows(layer, read, start, min(rows, out - start))
        here = slice(start, start + len(stored))
        bad = round_integer(
            stored, bits, group, grid.symmetric, grid.lowest_zero, codes, scales[here], zeros[here], sums
        )
        if bad >= 0:
            raise _first_bad(layer, stored, start, int(bad))
        if layout.order == "awq":
            pack_awq_columns(codes[: len(stored)], words, start)
        elif layout.order == "gptq":
            pack_columns(codes[: len(stored)].view(np.uint64), bits, words, start)
        else:
            pack_columns(codes[: len(stored)].view(np.uint64), bits, turned, 0)
            words[here] = turned[:, : len(stored)].T
    errors = Errors(float(sums[0]), float(sums[1]))
    if layout.order == "rows":
        parts: dict[str, np.ndarray] = {"weight_packed": words.view(np.int32), "weight_scale": scales.view(np.float16)}
        if not grid.symmetric:
            parts["weight_zero_point"] = np.ascontiguousarray(_zero_words(zeros, bits, layout).T)
        return parts | {"weight_shape": np.array(layer.shape, np.int64)}, errors
    parts = {
        "qweight": words.view(np.int32),
        "qzeros": _same_zero_words(out, groups, bits, layout) if grid.symmetric else _zero_words(zeros, bits, layout),
        "scales": np.ascontiguousarray(scales.T).view(np.float16),
    }
    if layout.group_index:
        parts["g_idx"] = (np.arange(width) // group).astype(np.int32)
    return parts, errors


@lru_cache(maxsize=16)
def _same_zero_words(out: int, groups: int, bits: int, layout: WordLayout) -> np.ndarray:
    """`_zero_words` of a symmetric grid, whose zero points are all 2^(bits-1)."""
    words = _zero_words(np.full((out, 1), 1 << (bits - 1), np.uint8), bits, layout)
    words = np.ascontiguousarray(np.broadcast_to(words, (groups, words.shape[1])))
    words.flags.writeable = False
    return words


def _zero_words(zeros: np.ndarray, bits: int, layout: WordLayout) -> np.ndarray:
    """[out, groups] zero points -> [groups, words] int32."""
    out = len(zeros)
    stored = (zeros.T.astype(np.int16) - layout.zero_offset & (1 << bits) - 1).astype(np.uint8)
    if layout.order == "awq":
        stored = stored.reshape(len(stored), -1, 8)[:, :, list(AWQ_ORDER)].reshape(len(stored), -1)
    per_word = 32 // math.gcd(bits, 32)
    stored = np.pad(stored, ((0, 0), (0, -out % per_word)))
    stream = np.unpackbits(stored[:, :, None], axis=-1, count=bits, bitorder="little").reshape(len(stored), -1)
    words = np.packbits(stream, axis=-1, bitorder="little").view(np.int32)[:, : -(-out * bits // 32)]
    return np.ascontiguousarray(words)


def _mx(layer: Layer, read: Read) -> tuple[dict[str, np.ndarray], Errors]:
    from roundel.ops.numba.microscaling import mx_parameters, round_mx
    from roundel.ops.numba.packing import pack_nibbles

    element, (out, width) = layer.scheme.weight.element, layer.shape
    four, rows = element.name == "e2m1", slab_rows(layer)
    weight = _scratch.array("words", (out, width // 2 if four else width), np.uint8)
    exponents, sums = _scratch.array("scales", (out, width // 32), np.uint8), np.zeros(2)
    codes = _scratch.array("codes", (min(rows, out), width), np.uint8)
    for start in range(0, out, rows):
        stored = _stored_rows(layer, read, start, min(rows, out - start))
        here = slice(start, start + len(stored))
        target = codes[: len(stored)] if four else weight[here]
        bad = round_mx(stored, *mx_parameters(element.name, element.hi), target, exponents[here], sums)
        if bad >= 0:
            raise _first_bad(layer, stored, start, int(bad))
        if four:
            pack_nibbles(target, weight[here])
    parts = {"weight_packed" if four else "weight": weight, "weight_scale": exponents}
    return parts, Errors(float(sums[0]), float(sums[1]))


def _first_bad(layer: Layer, stored: np.ndarray, start: int, flat: int) -> NumericsError:
    """The error for the first weight that is not finite, or else the largest, of the block a kernel stopped at."""
    row, column = divmod(flat, layer.shape[1])
    block = stored[row, column : column + layer.scheme.weight.block_of(layer.shape)[1]]
    if layer.dtype == "BF16":
        values = (block.astype(np.uint32) << 16).view(np.float32)
    else:
        values = block.view(np.float16 if layer.dtype == "F16" else np.float32).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(values))
    at = int(bad[0]) if len(bad) else int(np.abs(values).argmax())
    return not_finite(layer, start + row, column + at, float(values[at]))
