"""How packed weights lie for the CPU: a word of 16 bits holds one column's codes of several neighbouring rows.

Rows come in blocks of 8 or 16. A block has one or more *streams* of words, one word for each column. A word holds as
many rows whole as it has room for, from its lowest bits up, the first stream the first rows; what is left of the words,
stream by stream, holds the last rows, from the lowest bits up:

    2 bits   one stream: rows 0 to 7             3 bits   three of 5 rows, and in 1 bit of each row 15
    4 bits   two streams of 4 rows               5 bits   five of 3 rows, and in 1 bit of each row 15
    8 bits   four streams of 2 rows              6 bits   three of 2 rows, and in 4 bits of each rows 6 and 7
                                                 7 bits   seven of 2 rows, and in 2 bits of each rows 14 and 15

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

__all__ = ["FEW", "LAYOUTS", "WORD", "Layout", "Take"]

WORD = 16  # bits
FEW = 16  # inputs at a time, up to which weights are decoded in registers; beyond, rows of them for torch


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
        """Where a row of a block lies: whole in one word, or in what is left of several."""
        word, place = divmod(row, self.each)
        if word < self.streams:
            return (Take(word, self.bits * place, (1 << self.bits) - 1),)
        used, first, found = self.bits * self.each, (row - self.each * self.streams) * self.bits, 0
        takes = []
        while found < self.bits:
            word, start = divmod(first + found, WORD - used)
            width = min(WORD - used - start, self.bits - found)
            takes.append(Take(word, used + start, (1 << width) - 1, up=found))
            found += width
        return tuple(takes)

    def parts(self, rows: int) -> list[range]:
        """The rows of a block in runs of so many, which divide them."""
        return [range(start, start + rows) for start in range(0, self.rows, rows)]


LAYOUTS = {
    2: Layout(2, rows=8, each=8, streams=1),
    3: Layout(3, rows=16, each=5, streams=3),
    4: Layout(4, rows=8, each=4, streams=2),
    5: Layout(5, rows=16, each=3, streams=5),
    6: Layout(6, rows=8, each=2, streams=3),
    7: Layout(7, rows=16, each=2, streams=7),
    8: Layout(8, rows=8, each=2, streams=4),
}
