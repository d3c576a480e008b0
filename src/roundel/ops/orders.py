"""The orders in which formats interleave codes, as data."""

from __future__ import annotations

__all__ = ["AWQ_ORDER"]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble p of a word holds column AWQ_ORDER[p] of its eight
