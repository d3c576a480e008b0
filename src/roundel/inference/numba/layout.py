"""How packed weights lie for the CPU: a word of 16 bits holds one column's codes of several neighbouring rows.

Rows come in blocks of 8 (2, 4 and 8 bits) or 16 (3 bits). A block has one or more *streams* of words, one word for each
column; rows of a block, from a word's lowest bits up:

    2 bits   one stream: rows 0 to 7
    4 bits   two streams: rows 0 to 3, and 4 to 7
    8 bits   four streams: rows 0 and 1, 2 and 3, ...
    3 bits   three streams: rows 0 to 4, 5 to 9, 10 to 14; their topmost bits are row 15, stream 0's the lowest

    words    uint16 [blocks, streams, columns], columns filled up with zeros to a multiple of 16
    scales   [blocks, groups, rows of a block], bits of the dtype they are stored in
    zeros    uint8, like scales; none where the grid is symmetric, whose zero point is 2^(bits-1)

Why: sixteen columns are one vector load, and each row then costs a shift, a mask, and one instruction that multiplies
by sixteen inputs of 16 bits and adds neighbours. A group's scale is applied once for all its columns, whatever the
group's size. Memory is read once, in order. The bits are those of the checkpoint: nothing is added but what fills up
the last block.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LAYOUTS", "WORD", "Layout", "Take"]

WORD = 16  # bits


@dataclass(frozen=True)
class Take:
    """Where bits of a row lie in the words of its block: (words[word] >> down & mask) << up."""

    word: int
    down: int
    mask: int
    up: int = 0


@dataclass(frozen=True)
class Layout:
    """The words of one width.

    rows      of a block
    each      rows that lie whole in one word
    streams   words for each column of a block
    """

    bits: int
    rows: int
    each: int
    streams: int

    def takes(self, row: int) -> tuple[Take, ...]:
        """Where a row of a block lies; one whose bits are spread lies in all words."""
        word, place = divmod(row, self.each)
        if word == self.streams:
            return tuple(Take(bit, WORD - 1, 1, up=bit) for bit in range(self.bits))
        return (Take(word, self.bits * place, (1 << self.bits) - 1),)

    def parts(self, rows: int) -> list[range]:
        """The rows of a block in runs of so many, which divide them."""
        return [range(start, start + rows) for start in range(0, self.rows, rows)]


LAYOUTS = {
    2: Layout(2, rows=8, each=8, streams=1),
    3: Layout(3, rows=16, each=5, streams=3),
    4: Layout(4, rows=8, each=4, streams=2),
    8: Layout(8, rows=8, each=2, streams=4),
}
