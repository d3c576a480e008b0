"""How ggml's block types lie in bytes: `pack` and `unpack`, exact inverses, from a table of fields.

A row of a matrix is a row of blocks (of 32 or 256 weights); a block is its fields, one after the other. Source of the
layouts: llama.cpp, ggml/src/ggml-common.h (the block_* structures), and the dequantize_row_* functions of
ggml/src/ggml-quants.c. Not covered: the types that need a codebook (IQ1 to IQ3), NVFP4, and types only used while
computing (Q8_1, Q8_K).

TQ1_0 holds 243 of 256 possible bytes; another byte is read as ggml reads it, and not written again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from roundel.errors import GridError
from roundel.io.gguf import GGML_TYPES
from roundel.ops import use_kernels
from roundel.ops.blocks import StoredBlocks, as_stored, as_tensor, round_blocks
from roundel.scheme import BLOCK_GRIDS, Grid
from roundel.tensor import QuantizedTensor

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = ["BLOCK_TYPES", "BlockType", "Half", "Plane", "SixBits", "Trits"]

SLAB = 1 << 18  # weights rounded and packed at a time


@dataclass(frozen=True)
class Half:
    """One float16 (for MXFP4 one byte) of a block. of: "scale" or "low"."""

    of: str


@dataclass(frozen=True)
class Plane:
    """Some bits of every number of a block, several numbers to a byte.

    of     "codes", "levels", or "both": scale levels and after them levels of minima
    bits   how many bits of a number
    span   numbers that share span * bits / 8 bytes: byte i of these holds number i in its lowest bits, above it number
           i + span * bits / 8, and so on
    first  the lowest of the bits
    """

    of: str
    bits: int
    span: int
    first: int = 0


@dataclass(frozen=True)
class SixBits:
    """Eight 6-bit levels and eight 6-bit levels of minima in 12 bytes.

    Bytes 0 to 3 hold levels 0 to 3, bytes 4 to 7 those of minima, each with the upper two bits of the level four
    further on top; bytes 8 to 11 the lower four bits of levels 4 to 7, and of minima above them.
    """


@dataclass(frozen=True)
class Trits:
    """Numbers 0 to 2, five to a byte: the byte is ceil(256 / 243 * (81 a + 27 b + 9 c + 3 d + e)).

    spans   (numbers a byte holds, bytes): of `bytes` bytes, byte i holds numbers i, i + bytes, ...
    """

    spans: tuple[tuple[int, int], ...]


Field = Half | Plane | SixBits | Trits


@dataclass(frozen=True, kw_only=True)
class BlockType:
    """One way to store a matrix row by row.

    name     as ggml spells it
    fields   of a block, in order
    """

    name: str
    fields: tuple[Field, ...]

    @property
    def weights(self) -> int:
        """In a block."""
        return GGML_TYPES[self.name].weights

    @property
    def nbytes(self) -> int:
        """Of a block."""
        return GGML_TYPES[self.name].nbytes

    @property
    def grid(self) -> Grid:
        return BLOCK_GRIDS[self.name]

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` weights. Raises GridError where they are no whole blocks."""
        if width % self.weights:
            raise GridError(f"{self.name} stores blocks of {self.weights} weights; {width} inputs do not divide")
        return width // self.weights * self.nbytes

    def pack(self, tensor: QuantizedTensor) -> Tensor:
        """A matrix on this type's grid -> uint8 [out, bytes of a row]."""
        if tensor.grid != self.grid:
            raise GridError(f"{self.name} stores its own grid, not {tensor.grid}")
        return self.pack_stored(as_stored(tensor))

    def unpack(self, packed: Tensor) -> QuantizedTensor:
        """uint8 [out, bytes of a row] -> the matrix: the inverse of `pack`."""
        return as_tensor(self.unpack_stored(packed), self.name)

    def pack_stored(self, stored: StoredBlocks) -> Tensor:
        """The numbers of a matrix as they are stored -> bytes."""
        import torch

        out, width = stored.codes.shape
        packed = torch.empty((out, self.row_bytes(width)), dtype=torch.uint8, device=stored.codes.device)
        self._lay(stored, packed)
        return packed

    def pack_stored_reference(self, stored: StoredBlocks) -> Tensor:
        """`pack_stored` in plain torch, on any device."""
        import torch

        out, width = stored.codes.shape
        count = out * width // self.weights
        parts = [_pack_field(field, stored, count) for field in self.fields]
        return torch.cat(parts, dim=-1).reshape(out, -1)

    def round_and_pack(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        """A float matrix [out, in] -> uint8 [out, bytes of a row], a slab of rows at a time: `round_blocks` and
        `pack_stored`, with little more memory than the result."""
        import torch

        out, width = weight.shape
        packed = torch.empty((out, self.row_bytes(width)), dtype=torch.uint8, device=weight.device)
        rows = max(1, SLAB // max(1, width))
        for start in range(0, out, rows):
            slab = slice(start, start + rows)
            counted = importance[slab] if importance is not None and importance.ndim == 2 else importance
            self._lay(round_blocks(weight[slab], self.name, counted), packed[slab])
        return packed

    def _lay(self, stored: StoredBlocks, packed: Tensor) -> None:
        if use_kernels() and packed.device.type == "cpu" and packed.numel():
            self._place(stored, packed.numpy().reshape(-1, self.nbytes))
        else:
            packed.copy_(self.pack_stored_reference(stored))

    def _place(self, stored: StoredBlocks, packed: np.ndarray) -> None:
        """`pack_stored_reference` by kernels. packed: [blocks, bytes of one]."""
        from roundel.ops.numba.planes import place_bytes, place_plane, place_six_bits

        begin, count = 0, packed.shape[0]
        numbers = {
            name: value.contiguous().numpy().reshape(count, -1)
            for name, value in (("codes", stored.codes), ("levels", stored.levels), ("low_levels", stored.low_levels))
            if value is not None
        }
        for field in self.fields:
            if isinstance(field, SixBits):
                place_six_bits(numbers["levels"], numbers["low_levels"], begin, packed)
            elif isinstance(field, Plane) and field.of != "both":
                place_plane(numbers[field.of], field.bits, field.span, field.first, begin, packed)
            else:
                place_bytes(_pack_field(field, stored, count).numpy(), begin, packed)
            begin += self.field_bytes(field)

    def unpack_stored(self, packed: Tensor) -> StoredBlocks:
        """The inverse of `pack_stored`."""
        import torch

        out = packed.shape[0]
        blocks = packed.reshape(-1, self.nbytes)
        grid, count = self.grid, blocks.shape[0]
        found: dict[str, Tensor] = {"codes": blocks.new_zeros((count, self.weights))}
        if isinstance(grid.scale, Grid):
            both = self.weights // grid.block[1] * (1 if grid.offset is None else 2)
            found["both"] = blocks.new_zeros((count, both))
        for field, part in self._fields_of(blocks):
            if isinstance(field, Half):
                found[field.of] = part if grid.scale == "E8M0" else part.contiguous().view(torch.float16)
            elif isinstance(field, SixBits):
                found["both"] = _unpack_six_bits(part)
            elif isinstance(field, Trits):
                found["codes"] = _unpack_trits(part, field)
            else:
                name = "codes" if field.of == "codes" else "both"
                found[name] |= _unpack_plane(part, field) << field.first
        both_levels = found.pop("both", None)
        if both_levels is not None:
            names = ("levels",) if grid.offset is None else ("levels", "low_levels")
            found |= dict(zip(names, both_levels.chunk(len(names), dim=-1), strict=True))
        return StoredBlocks(**{name: value.reshape(out, -1) for name, value in found.items()})

    def _fields_of(self, blocks: Tensor) -> Iterator[tuple[Field, Tensor]]:
        begin = 0
        for field in self.fields:
            size = self.field_bytes(field)
            yield field, blocks[:, begin : begin + size]
            begin += size

    def field_bytes(self, field: Field) -> int:
        """Bytes of a field in a block."""
        if isinstance(field, Half):
            return 1 if self.grid.scale == "E8M0" else 2
        if isinstance(field, SixBits):
            return 12
        if isinstance(field, Trits):
            return sum(nbytes for _, nbytes in field.spans)
        numbers = self.weights if field.of == "codes" else self.weights // self.grid.block[1]
        return numbers * (2 if field.of == "both" else 1) * field.bits // 8


def _pack_field(field: Field, stored: StoredBlocks, count: int) -> Tensor:
    import torch

    if isinstance(field, Half):
        value = stored.scale if field.of == "scale" else stored.low
        assert value is not None, field
        return value.reshape(count, 1).contiguous().view(torch.uint8)
    if isinstance(field, Trits):
        return _pack_trits(stored.codes.reshape(count, -1), field)
    if isinstance(field, SixBits) or field.of == "both":
        assert stored.levels is not None and stored.low_levels is not None, field
        numbers = torch.cat([each.reshape(count, -1) for each in (stored.levels, stored.low_levels)], dim=-1)
    else:
        value = stored.codes if field.of == "codes" else stored.levels
        assert value is not None, field
        numbers = value.reshape(count, -1)
    return _pack_six_bits(numbers) if isinstance(field, SixBits) else _pack_plane(numbers, field)


def _pack_plane(numbers: Tensor, field: Plane) -> Tensor:
    """[blocks, n] uint8 -> [blocks, n * bits / 8]"""
    import torch

    per_byte = 8 // field.bits
    parts = (numbers >> field.first) & ((1 << field.bits) - 1)
    parts = parts.reshape(len(numbers), -1, per_byte, field.span // per_byte)
    packed = torch.zeros_like(parts[:, :, 0])
    for k in range(per_byte):
        packed |= parts[:, :, k] << (k * field.bits)
    return packed.flatten(1)


def _unpack_plane(packed: Tensor, field: Plane) -> Tensor:
    import torch

    per_byte = 8 // field.bits
    chunks = packed.reshape(len(packed), -1, 1, field.span // per_byte)
    shifts = torch.arange(per_byte, dtype=torch.uint8, device=packed.device)[:, None] * field.bits
    return ((chunks >> shifts) & ((1 << field.bits) - 1)).flatten(1)


def _pack_six_bits(numbers: Tensor) -> Tensor:
    import torch

    early, late = numbers.reshape(-1, 2, 2, 4).unbind(2)  # [blocks, levels and minima, 4]
    tops = early | (late >> 4) << 6
    lows = (late[:, 0] & 0xF) | (late[:, 1] & 0xF) << 4
    return torch.cat([tops.flatten(1), lows], dim=-1)


def _unpack_six_bits(packed: Tensor) -> Tensor:
    import torch

    tops, lows = packed[:, :8].reshape(-1, 2, 4), packed[:, 8:]
    late = torch.stack([lows & 0xF, lows >> 4], dim=1) | (tops >> 6) << 4
    return torch.stack([tops & 63, late], dim=2).flatten(1)


def _pack_trits(codes: Tensor, field: Trits) -> Tensor:
    import torch

    begin, parts = 0, []
    for per_byte, nbytes in field.spans:
        digits = codes[:, begin : begin + per_byte * nbytes].reshape(len(codes), per_byte, nbytes).int()
        value = torch.zeros_like(digits[:, 0])
        for k in range(5):
            value = value * 3 + (digits[:, k] if k < per_byte else 0)
        parts.append(((value * 256 + 242) // 243).to(torch.uint8))
        begin += per_byte * nbytes
    return torch.cat(parts, dim=-1)


def _unpack_trits(packed: Tensor, field: Trits) -> Tensor:
    import torch

    begin, parts = 0, []
    for per_byte, nbytes in field.spans:
        value = packed[:, begin : begin + nbytes].int()
        parts += [((value * 3**k % 256 * 3) >> 8).to(torch.uint8) for k in range(per_byte)]
        begin += nbytes
    return torch.cat(parts, dim=-1)


_D, _LOW = Half("scale"), Half("low")
_NIBBLES = Plane("codes", 4, 32)
_WIDE_NIBBLES = Plane("codes", 4, 64)
_PAIRS = Plane("codes", 2, 128)
_FIFTH_OF_32 = Plane("codes", 1, 8, first=4)

BLOCK_TYPES: dict[str, BlockType] = {
    name: BlockType(name=name, fields=fields)
    for name, fields in (
        ("Q4_0", (_D, _NIBBLES)),
        ("Q4_1", (_D, _LOW, _NIBBLES)),
        ("Q5_0", (_D, _FIFTH_OF_32, _NIBBLES)),
        ("Q5_1", (_D, _LOW, _FIFTH_OF_32, _NIBBLES)),
        ("Q8_0", (_D, Plane("codes", 8, 32))),
        ("Q2_K", (Plane("both", 4, 32), _PAIRS, _D, _LOW)),
        ("Q3_K", (
            Plane("codes", 1, 256, first=2), _PAIRS, Plane("levels", 4, 16), Plane("levels", 2, 16, first=4), _D,
        )),
        ("Q4_K", (_D, _LOW, SixBits(), _WIDE_NIBBLES)),
        ("Q5_K", (_D, _LOW, SixBits(), Plane("codes", 1, 256, first=4), _WIDE_NIBBLES)),
        ("Q6_K", (Plane("codes", 4, 128), Plane("codes", 2, 128, first=4), Plane("levels", 8, 16), _D)),
        ("IQ4_NL", (_D, _NIBBLES)),
        ("IQ4_XS", (_D, Plane("levels", 2, 4, first=4), Plane("levels", 4, 2), _NIBBLES)),
        ("TQ1_0", (Trits(((5, 32), (5, 16), (4, 4))), _D)),
        ("TQ2_0", (_PAIRS, _D)),
        ("MXFP4", (_D, _NIBBLES)),
    )
}  # fmt: skip
