"""What one code means: Element, and the tables of values of those that are indices."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["ELEMENTS", "Element"]

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
E0M3_VALUES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, -0.0, -0.25, -0.5, -0.75, -1.0, -1.25, -1.5, -1.75)
IQ4NL_VALUES = tuple(map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)))
TERNARY_VALUES = (-1.0, 0.0, 1.0, 2.0)  # the last has a code in two bits and is never written
FP4_VALUES = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True, kw_only=True)
class Element:
    """What one code means.

    name     "int4" (signed), "uint4" (with a zero point), "e2m1", "e4m3", "e8m0", "e0m3" (quarters with a sign), "nf4",
             "iq4nl", "ternary"; "fp4" and "dynamic8", which are bitsandbytes'
    bits     stored bits per code
    lo, hi   smallest and largest code of an integer; smallest and largest value of a float
    values   the value of code 0, 1, 2 ... where codes are indices into a table; else None and a code is its own value
    """

    name: str
    bits: int
    lo: float
    hi: float
    values: tuple[float, ...] | None = None

    @property
    def is_integer(self) -> bool:
        return "int" in self.name


def _dynamic_values() -> tuple[float, ...]:
    """bitsandbytes' signed dynamic map (Dettmers et al. 2021, arXiv:2110.02861): seven decades, each with twice as many
    values, evenly spaced, as the one below; 0 and 1. Rounded to float32 step by step, as theirs is."""

    def single(value: float) -> float:
        return float(struct.unpack("f", struct.pack("f", value))[0])

    found, low = [0.0, 1.0], single(0.1)
    for decade in range(7):
        count = 2**decade
        step = single(single(1.0 - low) / count)
        ends = [
            single(low + step * i) if i <= count // 2 else single(1.0 - step * (count - i)) for i in range(count + 1)
        ]
        for left, right in pairwise(ends):
            value = single(single(10 ** (decade - 6)) * single(single(left + right) / 2))
            found += [value, -value]
    return tuple(sorted(found))


def _elements() -> dict[str, Element]:
    signed = [Element(name=f"int{b}", bits=b, lo=-(2 ** (b - 1)), hi=2 ** (b - 1) - 1) for b in range(1, 9)]
    unsigned = [Element(name=f"uint{b}", bits=b, lo=0, hi=2**b - 1) for b in range(1, 9)]
    floats = [
        Element(name="e0m3", bits=4, lo=-1.75, hi=1.75, values=E0M3_VALUES),
        Element(name="e2m1", bits=4, lo=-6.0, hi=6.0, values=E2M1_VALUES),
        Element(name="nf4", bits=4, lo=-1.0, hi=1.0, values=NF4_VALUES),
        Element(name="iq4nl", bits=4, lo=-127.0, hi=113.0, values=IQ4NL_VALUES),
        Element(name="ternary", bits=2, lo=-1.0, hi=1.0, values=TERNARY_VALUES),
        Element(name="fp4", bits=4, lo=-1.0, hi=1.0, values=(*FP4_VALUES, 0.0, *(-v for v in FP4_VALUES[1:]))),
        Element(name="dynamic8", bits=8, lo=-1.0, hi=1.0, values=_dynamic_values()),
        Element(name="e4m3", bits=8, lo=-448.0, hi=448.0),
        Element(name="e8m0", bits=8, lo=2.0**-127, hi=2.0**127),
    ]
    return {e.name: e for e in signed + unsigned + floats}


ELEMENTS = _elements()
