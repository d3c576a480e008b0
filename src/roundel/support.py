"""The format x scheme support matrix, asked from the formats themselves: printed, never kept by hand."""

from __future__ import annotations

from collections.abc import Mapping

from roundel.algorithms import ALGORITHMS
from roundel.formats import FORMATS
from roundel.scheme import PRESETS, Scheme, integer_scheme
from roundel.unit import Layer, Stored

__all__ = ["NOT_LOADED", "nominal_layer", "shown_schemes", "support_rows"]


# (format, scheme) -> why none of the runtimes that tests start was seen to load it. All other cells were loaded, and
# the models said what they say with the weights as roundel reads them.
NOT_LOADED: Mapping[tuple[str, str], str] = {
    ("auto_round", "FP8_BLOCK"): "auto-round 0.16.1 compares the group size of its own files, a pair, with a number; "
    "llm_compressor and fp8 are loaded",
    ("auto_round", "FPW8A16"): "auto-round 0.16.1 refuses the group size of its own files, 0; llm_compressor is loaded",
}


def nominal_layer(scheme: Scheme) -> Layer:
    """A layer of ordinary shape, for asking what a format can store."""
    return Layer(name="layer", shape=(4096, 4096), dtype="BF16", scheme=scheme, stored=Stored())


def shown_schemes() -> dict[str, Scheme]:
    """Every preset, and the asymmetric variants of the common integer ones."""
    asymmetric = [integer_scheme(bits, 128, False) for bits in (2, 3, 4, 8)]
    return {**PRESETS, **{s.name: s for s in asymmetric}}


def support_rows() -> list[tuple[str, dict[str, str | None]]]:
    """(scheme, {format: why not, or None where it is stored}) for every scheme and written format."""
    algorithm = ALGORITHMS["rtn"]
    rows = []
    for name, scheme in shown_schemes().items():
        cells: dict[str, str | None] = {}
        for format in FORMATS.values():
            if format.writes:
                layer = nominal_layer(format.grid_of(scheme))
                cells[format.name] = format.refuse(layer) or algorithm.refuse(layer)
        rows.append((name, cells))
    return rows
