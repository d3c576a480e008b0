"""What one number of a quantized weight means: Element, Grid, Scheme, and the table of presets.

A `Scheme` is a value: two layers quantized alike have equal schemes. Nothing here touches a tensor, so a plan can be
made without torch. Preset names are auto-round's (its `schemes.py`), and compressed-tensors' where that has none; names
are read in any case. Other people's spellings ("w4a16_asym", "mx_fp4", `{"bits": 4, "group_size": 64}`) are understood
here and nowhere else.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Literal

from roundel.errors import RecipeError, nearest

__all__ = [
    "BLOCK_GRIDS",
    "ELEMENTS",
    "INTEGER_BITS",
    "LARGEST_BLOCK",
    "MIXES",
    "PRESETS",
    "Element",
    "Grid",
    "Mix",
    "Scheme",
    "describe_block",
]

INTEGER_BITS = range(2, 9)
LARGEST_BLOCK = 1 << 31  # along an axis; a file that says more is damaged
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


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The grid a matrix [out, in] is rounded to: weight = (code - zero) * scale, one scale for each block.

    element     what a code means
    block       (rows, columns) sharing one scale; 0 means the whole axis: (1, 128) group, (1, 0) channel,
                (0, 0) tensor, (128, 128) block. A last block may be cut short by the matrix.
    symmetric   True: no zero point, a code times the scale is the weight; False: unsigned codes and a zero point, or
                an offset, per block
    scale       dtype of the stored scale ("F16", "BF16", "F32", "E8M0"), or a Grid where scales are quantized too
    offset      the same of what is added after scaling; None where nothing is
    exponent    how a power-of-two scale is found: "floor" of log2(max) (OCP MX specification 1.0, section 6.3) or
                "rceil", the ceiling of log2(max / largest element)
    lowest_zero the smallest zero point a format can store: 1 where readers cannot represent 0 (GPTQ v1)
    rule        whose plain rounding it is: "range" fits scales to each block's range, "ggml" is that of ggml's types
    flat        blocks run on from row to row, without regard to where rows end (bitsandbytes)
    zero        what means 0.0 in an asymmetric block without an offset: a "code", or a "float" in its place (HQQ)
    """

    element: Element
    block: tuple[int, int]
    symmetric: bool = True
    scale: str | Grid = "F16"
    offset: str | Grid | None = None
    exponent: Literal["floor", "rceil"] = "floor"
    lowest_zero: int = 0
    rule: Literal["range", "ggml"] = "range"
    zero: Literal["code", "float"] = "code"
    flat: bool = False

    @property
    def is_integer(self) -> bool:
        """Whether it is integers under one float scale a block, with a whole zero point or without."""
        floats = self.scale in ("F16", "BF16", "F32")
        return self.element.is_integer and floats and self.offset is None and self.zero == "code"

    @property
    def is_plain_integer(self) -> bool:
        """Whether it is integers as they are rounded to: under one float16 scale a block."""
        return self.is_integer and self.scale == "F16"

    @property
    def is_integer_in_groups(self) -> bool:
        """Whether it is integers in groups of a row's columns, under one float scale each, with a zero point that is a
        code, or without."""
        return self.is_integer and self.block[0] == 1 and not self.flat

    @property
    def row_columns(self) -> int:
        """Of what a row's length has to be a multiple, where blocks cannot be cut short: ggml's types; else 1."""
        if self.rule != "ggml":
            return 1
        return self.block[1] * (self.scale.block[1] if isinstance(self.scale, Grid) else 1)

    @property
    def is_mx(self) -> bool:
        """Whether it is one of the MX floats, e2m1 or e4m3 under powers of two."""
        return self.scale == "E8M0" and self.element.name in ("e2m1", "e4m3") and self.rule == "range"

    def equals(self, other: Grid) -> bool:
        """Whether codes on the one are codes on the other, limits on zero points and rules of rounding left aside."""
        aside = {"lowest_zero": 0, "rule": "range", "exponent": "floor"}
        return replace(self, **aside) == replace(other, **aside)  # type: ignore[arg-type]

    def blocks(self, shape: tuple[int, int]) -> tuple[int, int]:
        """How many blocks a matrix of this shape has along [out, in]."""
        if self.flat:
            return 1, -(-shape[0] * shape[1] // self.block[1])
        rows, columns = self.block_of(shape)
        return -(-shape[0] // rows), -(-shape[1] // columns)

    def block_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The block with 0 replaced by the axis' length."""
        return self.block[0] or max(shape[0], 1), self.block[1] or max(shape[1], 1)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Stored bits per weight, scales and zero points included."""
        blocks = self.blocks(shape)
        count = blocks[0] * blocks[1]
        extra = 0.0
        if self.offset is not None:
            extra = _stored_bits(self.offset, blocks)
        elif not self.symmetric:
            extra = count * self.element.bits if self.zero == "code" else _stored_bits(self.scale, blocks)
        return self.element.bits + (_stored_bits(self.scale, blocks) + extra) / max(1, shape[0] * shape[1])


def _stored_bits(kind: str | Grid, blocks: tuple[int, int]) -> float:
    """What one value for each block takes, in all."""
    count = blocks[0] * blocks[1]
    if isinstance(kind, Grid):
        return kind.bits_per_weight(blocks) * count
    return float(count * {"E8M0": 8, "F8_E4M3": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64}[kind])


def describe_block(block: tuple[int, int]) -> str:
    """`group of 128`, `channel`, `tensor`, `128x128 block`: a block as people say it."""
    if block == (0, 0):
        return "tensor"
    if block == (1, 0):
        return "channel"
    return f"group of {block[1]}" if block[0] == 1 else f"{block[0]}x{block[1]} block"


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one layer is stored: the weight's grid and, where inputs are quantized at run time, theirs.

    name      the preset's name, or one made from the fields; two schemes are equal when their grids are
    weight    None for a layer that stays as it is
    input     None where inputs stay in 16 bits
    dynamic   whether input scales are computed at run time (True) or stored (False); of scales that are quantized
              themselves (NVFP4) the inner ones are, under a stored one for the tensor
    """

    name: str
    weight: Grid
    input: Grid | None = None
    dynamic: bool = True

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Scheme):
            return NotImplemented
        return (self.weight, self.input, self.dynamic) == (other.weight, other.input, other.dynamic)

    def __hash__(self) -> int:
        return hash((self.weight, self.input, self.dynamic))

    @property
    def bits(self) -> int:
        return self.weight.element.bits

    @property
    def is_integer(self) -> bool:
        return self.weight.is_plain_integer and self.weight.rule == "range"

    @property
    def stores_input_scale(self) -> bool:
        """Whether a scale of the inputs is stored, which has to be measured on calibration data."""
        return self.input is not None and (not self.dynamic or isinstance(self.input.scale, Grid))

    @property
    def group_size(self) -> int:
        """As other tools say it: -1 is one group per row, 0 one for the tensor, else weights in a group."""
        rows, columns = self.weight.block
        return (0 if rows == 0 else -1) if columns == 0 else columns

    @classmethod
    def parse(cls, text: str | Scheme | Mapping[str, object]) -> Scheme:
        """A scheme from a preset's name, from a foreign spelling, or from a mapping of fields.

        A mapping may hold `scheme` (the start; default W4A16), `bits`, `group_size`, `sym`.
        Raises RecipeError, naming the nearest known preset, when the text means nothing.
        """
        if isinstance(text, Scheme):
            return text
        if isinstance(text, Mapping):
            unknown = set(text) - {"scheme", "bits", "group_size", "sym"}
            if unknown:
                raise RecipeError(
                    f"A scheme has no field {sorted(unknown)[0]!r}. Allowed are scheme, bits, group_size and sym."
                    + nearest(str(sorted(unknown)[0]), ("scheme", "bits", "group_size", "sym"))
                )
            return cls.parse(str(text.get("scheme", "W4A16"))).altered(
                bits=_whole(text, "bits"), group_size=_whole(text, "group_size"), sym=_truth(text, "sym")
            )
        return _parse_name(text)

    def altered(self, bits: int | None = None, group_size: int | None = None, sym: bool | None = None) -> Scheme:
        """The same scheme with integer bits, group size or symmetry replaced; None keeps a value.

        Raises RecipeError when a value is not allowed, or the scheme's grid is fixed (MXFP4 ...).
        """
        if bits is None and group_size is None and sym is None:
            return self
        if not self.is_integer or self.input is not None:
            same = bits in (None, self.bits) and group_size in (None, self.group_size) and sym in (None, True)
            if same:
                return self
            raise RecipeError(
                f"{self.name} has a fixed grid ({self.bits} bits, {describe_block(self.weight.block)}, symmetric): "
                "bits, group size and symmetry cannot be changed. Choose an integer scheme such as W4A16 instead."
            )
        return integer_scheme(
            self.bits if bits is None else bits,
            self.group_size if group_size is None else group_size,
            self.weight.symmetric if sym is None else sym,
        )


def integer_scheme(bits: int, group_size: int = 128, sym: bool = True) -> Scheme:
    """Weight-only integers with float16 scales. Raises RecipeError for bits outside 2..8 or a group size below 1."""
    if bits not in INTEGER_BITS:
        raise RecipeError(f"bits={bits} is not possible: integer schemes have 2 to 8 bits.")
    if group_size == 0 or group_size < -1:
        raise RecipeError(
            f"group_size={group_size} is not possible: use a positive number of weights, or -1 for one scale per row."
        )
    name = f"W{bits}A16" + {128: "", -1: "G-1"}.get(group_size, f"G{group_size}") + ("" if sym else "_ASYM")
    element = ELEMENTS[f"{'int' if sym else 'uint'}{bits}"]
    block = (1, 0) if group_size == -1 else (1, group_size)
    return Scheme(name=name, weight=Grid(element=element, block=block, symmetric=sym, scale="F16"))


def _mx(name: str, element: str, exponent: Literal["floor", "rceil"] = "floor") -> Scheme:
    # auto-round's RCEIL presets change the activations only; weights keep the floor rule.
    weight = Grid(element=ELEMENTS[element], block=(1, 32), scale="E8M0")
    return Scheme(name=name, weight=weight, input=replace(weight, exponent=exponent))


def _nv(name: str, inputs: bool) -> Scheme:
    scale = Grid(element=ELEMENTS["e4m3"], block=(0, 0), scale="F32")
    weight = Grid(element=ELEMENTS["e2m1"], block=(1, 16), scale=scale)
    return Scheme(name=name, weight=weight, input=weight if inputs else None)


def _fp8(name: str, block: tuple[int, int], inputs: tuple[int, int] | None = None, dynamic: bool = True) -> Scheme:
    # Scales are bfloat16, as llm-compressor and auto-round store them; `fp8` stores DeepSeek's float32.
    weight = Grid(element=ELEMENTS["e4m3"], block=block, scale="BF16")
    return Scheme(name=name, weight=weight, input=_run_time("e4m3", inputs) if inputs else None, dynamic=dynamic)


def _run_time(element: str, block: tuple[int, int]) -> Grid:
    """The grid of inputs, [tokens, in], whose scales are no part of a file or one number of it."""
    return Grid(element=ELEMENTS[element], block=block, scale="F32")


def _integer_with_inputs(name: str, bits: int, group_size: int, inputs: str) -> Scheme:
    return replace(integer_scheme(bits, group_size), name=name, input=_run_time(inputs, (1, 0)))


def _table(name: str, element: str, nested: bool = False) -> Scheme:
    """bitsandbytes' 4 bits: a table times the largest magnitude of 64 weights; nested: these in 8 bits by 256."""
    scales = Grid(element=ELEMENTS["dynamic8"], block=(1, 256), symmetric=False, scale="F32", offset="F32", flat=True)
    weight = Grid(element=ELEMENTS[element], block=(1, 64), scale=scales if nested else "F32")
    return Scheme(name=name, weight=weight)


@dataclass(frozen=True)
class Mix:
    """Two presets by role: routed experts take one, every other layer the other."""

    name: str
    experts: str
    others: str


PRESETS: dict[str, Scheme] = {
    s.name: s
    for s in (
        *(integer_scheme(b, g) for b in INTEGER_BITS for g in (128, 64, 32)),
        _mx("MXFP4", "e2m1"),
        _mx("MXFP4_RCEIL", "e2m1", "rceil"),
        _mx("MXFP8", "e4m3"),
        _mx("MXFP8_RCEIL", "e4m3", "rceil"),
        replace(_mx("MXFP4A16", "e2m1"), input=None),
        replace(_mx("MXFP8A16", "e4m3"), input=None),
        _mx("MXINT4", "e0m3"),
        _nv("NVFP4", inputs=True),
        _nv("NVFP4A16", inputs=False),
        _integer_with_inputs("INT8_W8A8", 8, -1, "int8"),
        _integer_with_inputs("W4AFP8", 4, 128, "e4m3"),
        _fp8("FP8_DYNAMIC", (1, 0), (1, 0)),
        _fp8("FP8_BLOCK", (128, 128), (1, 128)),
        _fp8("FP8_STATIC", (1, 0), (0, 0), dynamic=False),
        _fp8("FP8", (0, 0), (0, 0), dynamic=False),
        _fp8("FPW8A16", (0, 0)),
        *(_table(name, name.lower()) for name in ("NF4", "FP4")),
        *(_table(name + "_DQ", name.lower(), nested=True) for name in ("NF4", "FP4")),
    )
}


def _super_grid(element: str, columns: int, level: str, minimum: bool = False) -> Grid:
    """Blocks whose scales (and minima) are whole numbers, 256 weights sharing one float16 for them."""
    levels = Grid(element=ELEMENTS[level], block=(1, 256 // columns))
    return Grid(
        element=ELEMENTS[element],
        block=(1, columns),
        symmetric=not minimum,
        scale=levels,
        offset=levels if minimum else None,
        rule="ggml",
    )


def _block_grid(element: str, columns: int = 32, minimum: bool = False) -> Grid:
    """Blocks with a float16 scale, and a float16 minimum or none."""
    offset = "F16" if minimum else None
    return Grid(element=ELEMENTS[element], block=(1, columns), symmetric=not minimum, offset=offset, rule="ggml")


# The block types of ggml, by its names. An offset is the minimum, negative.
BLOCK_GRIDS: dict[str, Grid] = {
    "Q4_0": _block_grid("int4"),
    "Q4_1": _block_grid("uint4", minimum=True),
    "Q5_0": _block_grid("int5"),
    "Q5_1": _block_grid("uint5", minimum=True),
    "Q8_0": _block_grid("int8"),
    "Q2_K": _super_grid("uint2", 16, "uint4", minimum=True),
    "Q3_K": _super_grid("int3", 16, "int6"),
    "Q4_K": _super_grid("uint4", 32, "uint6", minimum=True),
    "Q5_K": _super_grid("uint5", 32, "uint6", minimum=True),
    "Q6_K": _super_grid("int6", 16, "int8"),
    "IQ4_NL": _block_grid("iq4nl"),
    "IQ4_XS": _super_grid("iq4nl", 32, "int6"),
    "MXFP4": replace(PRESETS["MXFP4"].weight, rule="ggml"),
    "TQ1_0": _block_grid("ternary", 256),
    "TQ2_0": _block_grid("ternary", 256),
}
PRESETS |= {f"GGUF:{name}": Scheme(name=f"GGUF:{name}", weight=grid) for name, grid in BLOCK_GRIDS.items()}
BLOCK_NAMES = {grid: name for name, grid in reversed(BLOCK_GRIDS.items())}  # the first of those that round alike
MIXES: dict[str, Mix] = {m.name: m for m in (Mix("W4A16_MIXED", experts="W4A16", others="W8A16"),)}

_INTEGER_NAME = re.compile(r"W(?P<bits>\d+)A16(?:_?G(?P<group>-?\d+))?(?P<asym>_ASYM|_SYM)?")
_FOREIGN_NAMES = {
    "MX_FP4": "MXFP4",
    "MX_FP8": "MXFP8",
    "MX_INT4": "MXINT4",
    "NV_FP4": "NVFP4",
    "INT8": "INT8_W8A8",
    "W8A8": "INT8_W8A8",
    "FP8_W8A16": "FPW8A16",
}


@cache
def _parse_name(text: str) -> Scheme:
    name = text.strip().upper().replace("-", "_").replace("G_1", "G-1")
    name = _FOREIGN_NAMES.get(name, name)
    if name in PRESETS:
        return PRESETS[name]
    found = _INTEGER_NAME.fullmatch(name)
    if found:
        group = int(found["group"]) if found["group"] else 128
        return integer_scheme(int(found["bits"]), group, found["asym"] != "_ASYM")
    known = (*PRESETS, *MIXES)
    if name in MIXES:
        raise RecipeError(
            f"{text} is a mix of schemes for a whole model, not the scheme of one layer. Use one of its parts."
        )
    raise RecipeError(
        f"Unknown scheme {text!r}.{nearest(text, known)} Known are {', '.join(_short_list())}; "
        "or build one from W<bits>A16[G<group size>][_ASYM]. `roundel list schemes` shows all."
    )


def _short_list() -> list[str]:
    return [n for n in PRESETS if "G" not in n] + list(MIXES)


def _whole(fields: Mapping[str, object], key: str) -> int | None:
    value = fields.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise RecipeError(f"{key}={value!r} is not possible: {key} is a whole number.")
    return value


def _truth(fields: Mapping[str, object], key: str) -> bool | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, bool):
        raise RecipeError(f"{key}={value!r} is not possible: {key} is true or false.")
    return value
