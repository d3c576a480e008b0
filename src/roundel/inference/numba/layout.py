"""How packed weights lie for the CPU: a word holds one column's codes of several neighbouring rows.

Rows come in blocks of 8 (4 and 8 bits), 16 (2 bits) or 32 (3 bits). A block has one or more *streams* of uint32 words,
one word for each column; rows of a block, from a word's lowest bits up:

    4 bits   one stream: rows 0 to 7
    8 bits   two streams: rows 0 to 3, and 4 to 7
    2 bits   one stream: rows 0 to 15
    3 bits   three streams: rows 0 to 9, 10 to 19, 20 to 29; the two bits left over at the top of each hold row 30 (its
             low two bits in stream 0, its high bit in bit 30 of stream 2) and row 31 (stream 1; bit 31)

    words    uint32 [blocks, streams, columns], columns filled up with zeros to a multiple of 8
    scales   [blocks, groups, rows of a block], bits of the dtype they are stored in
    zeros    uint8, like scales; none where the grid is symmetric, whose zero point is 2^(bits-1)

Why: eight columns are one vector load, each row of the block then costs a mask, a conversion and a multiply-add with
the same eight inputs, and a group's scale is applied once for all its columns, whatever the group's size. Memory is
read once, in order. The bits are those of the checkpoint: nothing is added but what fills up the last block.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LAYOUTS", "Layout", "Take"]


@dataclass(frozen=True)
class Take:
    """Where a row's bits lie in the words of its block: (words[word] >> down & mask) << up."""

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
        """Where a row of a block lies; one whose bits are spread lies in two words."""
        word, place = divmod(row, self.each)
        if word == self.streams:
            return Take(place, 30, 3), Take(2, 30 + place, 1, up=2)
        return (Take(word, self.bits * place, (1 << self.bits) - 1),)

    def parts(self, most: int) -> list[range]:
        """The rows of a block in runs of `most` or fewer, such that a run of many lies in few words."""
        length = next(n for n in range(min(most, self.rows), 0, -1) if self.each % n == 0 or n % self.each == 0)
        return [range(start, min(start + length, self.rows)) for start in range(0, self.rows, length)]


LAYOUTS = {
    2: Layout(2, rows=16, each=16, streams=1),
    3: Layout(3, rows=32, each=10, streams=3),
    4: Layout(4, rows=8, each=8, streams=1),
    8: Layout(8, rows=8, each=4, streams=2),
}
