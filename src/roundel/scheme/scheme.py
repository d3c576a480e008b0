"""How a layer is stored: Scheme, the presets, and how people spell both.

Preset names are auto-round's (its `schemes.py`), and compressed-tensors' where that has none; names are read in any
case. Other people's spellings ("w4a16_asym", "mx_fp4", `{"bits": 4, "group_size": 64}`) are understood here and nowhere
else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from roundel.errors import RecipeError, nearest
from roundel.scheme.element import ELEMENTS
from roundel.scheme.ggml import BLOCK_GRIDS
from roundel.scheme.grid import Grid, describe_block

__all__ = ["DEFAULT_SCHEME", "INTEGER_BITS", "MIXES", "PRESETS", "Mix", "Scheme", "float_zero_scheme", "integer_scheme"]

INTEGER_BITS = range(2, 9)
DEFAULT_SCHEME = "W4A16"
HQQ_BITS = (1, 2, 3, 4, 5, 6, 8)  # that HQQ's files hold
GROUP_SIZE = 128  # of integers, where nothing says another


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
            return cls.parse(str(text.get("scheme", DEFAULT_SCHEME))).altered(
                bits=_whole(text, "bits"), group_size=_whole(text, "group_size"), sym=_truth(text, "sym")
            )
        return _parse_name(text)

    def altered(self, bits: int | None = None, group_size: int | None = None, sym: bool | None = None) -> Scheme:
        """The same scheme with integer bits, group size or symmetry replaced; None keeps a value.

        Raises RecipeError when a value is not allowed, or the scheme's grid is fixed (MXFP4 ...).
        """
        if bits is None and group_size is None and sym is None:
            return self
        if self.weight.zero == "float":
            if sym:
                raise RecipeError(
                    f"{self.name} has zero points: it is not symmetric. Leave --sym away, or choose W4A16."
                )
            return float_zero_scheme(
                self.bits if bits is None else bits, self.group_size if group_size is None else group_size
            )
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


def integer_scheme(bits: int, group_size: int = GROUP_SIZE, sym: bool = True) -> Scheme:
    """Weight-only integers with float16 scales. Raises RecipeError for bits outside 2..8 or a group size below 1."""
    if bits not in INTEGER_BITS:
        one = " One bit needs zero points that are no whole numbers: W1A16G64_HQQ." if bits == 1 else ""
        raise RecipeError(f"bits={bits} is not possible: integer schemes have 2 to 8 bits.{one}")
    name = _name_of(bits, group_size) + ("" if sym else "_ASYM")
    element = ELEMENTS[f"{'int' if sym else 'uint'}{bits}"]
    return Scheme(name=name, weight=Grid(element=element, block=_block(group_size), symmetric=sym, scale="F16"))


def float_zero_scheme(bits: int, group_size: int = GROUP_SIZE) -> Scheme:
    """Weight-only integers with float16 scales and float16 zero points, as HQQ's files hold them.

    Raises RecipeError for bits that these have no place for (7, or beyond 1..8) or a group size below 1.
    """
    if bits not in HQQ_BITS:
        raise RecipeError(f"bits={bits} is not possible: schemes with float zero points have 1 to 6 or 8 bits.")
    grid = Grid(element=ELEMENTS[f"uint{bits}"], block=_block(group_size), symmetric=False, zero="float")
    return Scheme(name=_name_of(bits, group_size) + "_HQQ", weight=grid)


def _block(group_size: int) -> tuple[int, int]:
    if group_size == 0 or group_size < -1:
        raise RecipeError(
            f"group_size={group_size} is not possible: use a positive number of weights, or -1 for one scale per row."
        )
    return (1, 0) if group_size == -1 else (1, group_size)


def _name_of(bits: int, group_size: int) -> str:
    return f"W{bits}A16" + {GROUP_SIZE: "", -1: "G-1"}.get(group_size, f"G{group_size}")


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
        *(float_zero_scheme(b, 64) for b in HQQ_BITS),
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
        *(Scheme(name=f"GGUF:{name}", weight=grid) for name, grid in BLOCK_GRIDS.items()),
    )
}
MIXES: dict[str, Mix] = {m.name: m for m in (Mix("W4A16_MIXED", experts="W4A16", others="W8A16"),)}

_INTEGER_NAME = re.compile(r"W(?P<bits>\d+)A16(?:_?G(?P<group>-?\d+))?(?P<kind>_ASYM|_SYM|_HQQ)?")
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
        group = int(found["group"]) if found["group"] else GROUP_SIZE
        if found["kind"] == "_HQQ":
            return float_zero_scheme(int(found["bits"]), group)
        return integer_scheme(int(found["bits"]), group, found["kind"] != "_ASYM")
    if name == "INT4":
        raise RecipeError(
            "INT4 rounds the inputs to 4 bits too, which no format stores. Use W4A16 or INT8_W8A8 instead."
        )
    known = (*PRESETS, *MIXES)
    if name in MIXES:
        raise RecipeError(
            f"{text} is a mix of schemes for a whole model, not the scheme of one layer. Use one of its parts."
        )
    raise RecipeError(
        f"Unknown scheme {text!r}.{nearest(text, known)} Known are {', '.join(_short_list())}; "
        "or build one from W<bits>A16[G<group size>][_ASYM|_HQQ]. `roundel list schemes` shows all."
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
