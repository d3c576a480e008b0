"""The pieces of a SentencePiece model (tokenizer.model): text, score and type of each.

The file is a protocol buffer; of it only the repeated field 1 is read: 1 is the piece's text, 2 its score, 3 its type
(sentencepiece_model.proto of google/sentencepiece). Everything else is skipped.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from roundel.errors import SourceError

__all__ = ["BYTE", "CONTROL", "NORMAL", "UNKNOWN", "UNUSED", "USER_DEFINED", "SentencePiece", "read_pieces"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types, there and in GGUF files
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class SentencePiece:
    text: str
    score: float = 0.0
    type: int = NORMAL


def read_pieces(data: bytes) -> list[SentencePiece]:
    """The pieces in the order of their ids. Raises SourceError for a file that is no such model."""
    try:
        pieces = [_piece(value) for number, value in _fields(data) if number == 1 and isinstance(value, bytes)]
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise SourceError(f"tokenizer.model is damaged: {error}. Fetch the file again.") from error
    if not pieces:
        raise SourceError("tokenizer.model holds no pieces. Fetch the file again.")
    return pieces


def _piece(data: bytes) -> SentencePiece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = value
    return SentencePiece(text, score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
        elif kind == _BYTES:
            length, at = _varint(data, at)
            if length > len(data) - at:
                raise IndexError(f"{length} bytes are announced and {len(data) - at} are left")
            yield number, data[at : at + length]
            at += length
        elif kind == _FIXED32:
            yield number, struct.unpack_from("<f", data, at)[0]
            at += 4
        elif kind == _FIXED64:
            yield number, struct.unpack_from("<d", data, at)[0]
            at += 8
        else:
            raise IndexError(f"a field of kind {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError("a number longer than 10 bytes")
