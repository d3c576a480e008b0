"""What one number of a quantized weight means: Element, Grid, Scheme, and the table of presets.

A `Scheme` is a value: two layers quantized alike have equal schemes. Nothing here touches a tensor, so a plan can be
made without torch.
"""

from roundel.scheme.element import ELEMENTS, Element
from roundel.scheme.ggml import BLOCK_GRIDS, BLOCK_NAMES
from roundel.scheme.grid import LARGEST_BLOCK, Grid, describe_block
from roundel.scheme.scheme import (
    DEFAULT_SCHEME,
    INTEGER_BITS,
    MIXES,
    PRESETS,
    Mix,
    Scheme,
    float_zero_scheme,
    integer_scheme,
)

__all__ = [
    "BLOCK_GRIDS",
    "BLOCK_NAMES",
    "DEFAULT_SCHEME",
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
    "float_zero_scheme",
    "integer_scheme",
]
