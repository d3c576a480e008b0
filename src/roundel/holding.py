"""On which scheme a format holds what is stored already: the same numbers where it can, else the nearest in size.

This follows from the grids, before a weight is read. Of all schemes that hold the numbers the first is taken by:
fewest bits a code, inputs as before, whatever the values are, with zero points or without as before, fewest bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from roundel.algorithms import Algorithm
from roundel.formats import FORMATS, Format
from roundel.regrid import is_certain, obstacle
from roundel.scheme import INTEGER_BITS, PRESETS, Scheme, integer_scheme
from roundel.unit import Layer

__all__ = ["as_fitted", "exact_scheme", "nearest_scheme", "why_not"]

GROUPS = (128, 64, 32, -1)


def exact_scheme(layer: Layer, format: Format, asked: Scheme | None, fallback: Algorithm | None) -> Scheme | None:
    """A scheme on which the format holds the stored numbers, as far as grids tell; None where there is none.

    asked      the only scheme that will do
    fallback   what rounds the layer where values do not fit; None: nothing may, and inputs that stay in 16 bits must
               not become rounded ones
    """
    stored = layer.stored.scheme
    assert stored is not None, "a packed layer"
    for candidate in candidates(stored, layer.shape) if asked is None else (asked,):
        if why_not(layer, format, candidate) is not None:
            continue
        scheme = format.grid_of(candidate)
        adds_inputs = scheme.input is not None and scheme.input != stored.input
        if adds_inputs and (fallback is None or scheme.stores_input_scale):
            continue
        certain = is_certain(stored.weight, scheme.weight)
        if certain or fallback is None or fallback.refuse(replace(layer, scheme=as_fitted(scheme))) is None:
            return scheme
    return None


def why_not(layer: Layer, format: Format, candidate: Scheme) -> str | None:
    """Why a format does not hold the stored numbers on a scheme, as far as grids tell; None where it may."""
    stored = layer.stored.scheme
    assert stored is not None, "a packed layer"
    if layer.stored.cut is not None:
        return f"{format.name} stores it in parts, which are cut out of what it decodes to"
    scheme = format.grid_of(candidate)
    moved = replace(layer, scheme=scheme, permuted=layer.stored.permuted)
    source = FORMATS.get(layer.stored.format)
    blurs = source is not None and source.blurs(layer) is not None and scheme.weight == stored.weight  # and so it stays
    refused = format.refuse(moved) or (None if blurs else format.blurs(moved))
    if refused is not None:
        return refused
    if scheme.stores_input_scale and not stored.stores_input_scale:
        return f"{scheme.name} stores a scale of the inputs, and {stored.name} has none"
    reason = obstacle(stored.weight, scheme.weight, layer.shape)
    return reason and f"it does not fit {scheme.name}: {reason}"


def nearest_scheme(layer: Layer, format: Format, algorithm: Algorithm) -> Scheme | None:
    """The scheme that the format stores and the algorithm rounds to, nearest in size to the stored one and, where there
    is such, not smaller; None where there is none."""
    stored = layer.stored.scheme
    assert stored is not None, "a packed layer"
    size = stored.weight.bits_per_weight(layer.shape)

    def distance(scheme: Scheme) -> tuple[bool, float, bool]:
        bits = scheme.weight.bits_per_weight(layer.shape)
        return bits < size, abs(bits - size), scheme.weight.symmetric != stored.weight.symmetric

    for candidate in sorted(_known(), key=distance):
        scheme = format.grid_of(candidate)
        taken = replace(layer, scheme=scheme)
        if scheme.stores_input_scale or format.refuse(taken) is not None or algorithm.refuse(taken) is not None:
            continue
        if scheme.input in (None, stored.input) or format.rounds_inputs:
            return scheme
    return None


@lru_cache(maxsize=1024)
def candidates(stored: Scheme, shape: tuple[int, int]) -> tuple[Scheme, ...]:
    """Schemes that may hold a matrix [out, in], the best first."""

    def order(scheme: Scheme) -> tuple[int, int, bool, bool, float, bool]:
        inputs = 0 if (scheme.input, scheme.dynamic) == (stored.input, stored.dynamic) else 1 if not scheme.input else 2
        symmetry = scheme.weight.symmetric != stored.weight.symmetric
        certain = is_certain(stored.weight, scheme.weight)
        return (
            scheme.bits,
            inputs,
            not certain,
            symmetry,
            scheme.weight.bits_per_weight(shape),
            scheme.weight.rule == "ggml",
        )

    found = (s for s in (stored, *_variants(stored), *_known()) if obstacle(stored.weight, s.weight, shape) is None)
    return tuple(sorted(dict.fromkeys(found), key=order))


def _variants(stored: Scheme) -> Iterator[Scheme]:
    """Schemes of no preset: integers and offsets with scales in other floats, presets with the stored ones' scales."""
    for scheme in _known():
        floats = isinstance(stored.weight.scale, str) and isinstance(scheme.weight.scale, str)
        if scheme.weight.rule == "ggml":
            continue
        if scheme.weight.is_integer:
            yield replace(scheme, weight=replace(scheme.weight, scale="F32"))
        elif floats and stored.weight.element == scheme.weight.element:
            yield replace(scheme, weight=replace(scheme.weight, scale=stored.weight.scale))
    if not stored.weight.symmetric and stored.weight.element.is_integer and stored.bits in INTEGER_BITS:
        for group in GROUPS[:3]:
            grid = integer_scheme(stored.bits, group, False).weight
            name = f"W{stored.bits}A16G{group}_OFFSET"
            for dtype in ("F16", "F32"):
                yield Scheme(name=name, weight=replace(grid, scale=dtype, offset=dtype))


@lru_cache(maxsize=1)
def _known() -> tuple[Scheme, ...]:
    whole = (integer_scheme(bits, group, sym) for bits in INTEGER_BITS for group in GROUPS for sym in (True, False))
    return tuple(dict.fromkeys((*PRESETS.values(), *whole)))


def as_fitted(scheme: Scheme) -> Scheme:
    """Integers are rounded to float16 scales, whatever they are stored in."""
    return replace(scheme, weight=replace(scheme.weight, scale="F16")) if scheme.weight.is_integer else scheme
