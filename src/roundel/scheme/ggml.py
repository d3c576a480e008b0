"""The grids of ggml's block types, by its names. Layouts and arithmetic are ggml's (ggml-quants.c); an offset is the
minimum, negative."""

from __future__ import annotations

from roundel.scheme.element import ELEMENTS
from roundel.scheme.grid import Grid

__all__ = ["BLOCK_GRIDS", "BLOCK_NAMES"]


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
    "MXFP4": Grid(element=ELEMENTS["e2m1"], block=(1, 32), scale="E8M0", rule="ggml"),
    "TQ1_0": _block_grid("ternary", 256),
    "TQ2_0": _block_grid("ternary", 256),
}
BLOCK_NAMES = {grid: name for name, grid in reversed(BLOCK_GRIDS.items())}  # the first of those that round alike
