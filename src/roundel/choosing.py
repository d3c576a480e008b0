"""Which scheme every matrix gets, and why; what the algorithm and the formats refuse. Problems are gathered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from roundel.algorithms import ALGORITHMS
from roundel.checkpoint import Matrix
from roundel.errors import PlanError, nearest
from roundel.families.generic import CONV1D
from roundel.formats import FORMATS, Format
from roundel.holding import exact_scheme, nearest_scheme, why_not
from roundel.recipe import Recipe, matches, scheme_of_entry
from roundel.regrid import is_certain
from roundel.scheme import Scheme
from roundel.unit import Layer

__all__ = ["Choice", "choose", "choose_conversions", "head_asked", "layers_of", "settle"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The scheme a layer gets (None: it stays in full precision), and where that was decided."""

    scheme: Scheme | None
    origin: str


def head_asked(recipe: Recipe, head: str) -> bool:
    """Whether the output head is to be rounded."""
    return recipe.quant_lm_head or head in recipe.layer_config


def choose(
    matrices: Mapping[str, Matrix], recipe: Recipe, head: str, problems: list[str], formats: Sequence[Format] = ()
) -> dict[str, Choice]:
    """The scheme of every matrix, or why it stays. A format that decides itself does so before layer_config."""
    choices: dict[str, Choice] = {}
    decided = {name: scheme for f in formats for name, scheme in (f.schemes() or {}).items()}
    for matrix in matrices.values():
        reason = matrix.reason
        if matrix.name == head and head_asked(recipe, head):
            reason = None
        scheme = None if reason else recipe.default_for(matrix.role)
        choices[matrix.name] = Choice(scheme=scheme, origin=reason or f"scheme {recipe.label}")
        if decided:
            scheme, origin = decided.get(matrix.name), f"format {recipe.formats[0]}"
            choices[matrix.name] = Choice(scheme=scheme, origin=origin if scheme or not reason else reason)
    linear = [name for name, choice in choices.items() if choice.scheme is not None]
    for pattern, value in sorted(recipe.layer_config.items(), key=lambda entry: entry[0] in matrices):
        found = {pattern} if pattern in matrices else matches(pattern, choices) & set(linear)
        if not found:
            problems.append(_unmatched("layer_config", pattern, linear, choices))
        for name in found:
            if matrices[name].reason == CONV1D and pattern == name:
                problems.append(f"layer_config {name!r}: {CONV1D}. It cannot be rounded; take it out.")
            scheme = scheme_of_entry(pattern, value, recipe.default_for(matrices[name].role))
            choices[name] = Choice(scheme=scheme, origin=f"layer_config {pattern!r}")
    exact = {p for p in recipe.layer_config if p in matrices}
    for pattern in recipe.ignore_layers:
        found = matches(pattern, choices)
        if not found:
            problems.append(_unmatched("ignore_layers", pattern, linear, choices))
        for name in found & set(linear) - exact:
            choices[name] = Choice(scheme=None, origin=f"ignore_layers {pattern!r}")
    return choices


def choose_conversions(
    matrices: Mapping[str, Matrix], recipe: Recipe, embedding: str, problems: list[str], format: Format
) -> dict[str, Choice]:
    """The scheme of every matrix that is quantized already, on which the format holds it; all others stay.

    Without one a layer is a problem or, where the recipe allows that, rounded anew.
    """
    if format.floats is not None:
        return {name: Choice(scheme=None, origin=f"format {format.name}") for name in matrices}
    rounds = recipe.conversion == "requantize"
    algorithm = recipe.chain.algorithm
    decided = format.schemes() or {}
    choices: dict[str, Choice] = {}
    refused: dict[str, list[Layer]] = {}
    unmeasured: list[Layer] = []
    for matrix in matrices.values():
        asked = decided.get(matrix.name) if recipe.converts_as_stored else recipe.default_for(matrix.role)
        if matrix.stored.scheme is None:
            own = asked if rounds and matrix.name in decided else None
            choices[matrix.name] = Choice(scheme=own, origin=f"format {format.name}" if own else "not quantized")
            continue
        if matrix.name == embedding and not format.embeds:
            choices[matrix.name] = Choice(scheme=None, origin=f"readers of {format.name} take no rounded embedding")
            continue
        layer = matrix.layer()
        fits = exact_scheme(layer, format, asked, algorithm if rounds else None)
        if fits is not None or not rounds:
            origin = "as stored" if fits == matrix.stored.scheme else f"holds {matrix.stored.scheme.name}"
            choices[matrix.name] = Choice(scheme=fits, origin=origin)
            if fits is None:
                refused.setdefault(why_not(layer, format, asked or matrix.stored.scheme) or "", []).append(layer)
            continue
        new = asked or nearest_scheme(layer, format, algorithm)
        choices[matrix.name] = Choice(scheme=new, origin=f"rounded anew from {matrix.stored.scheme.name}")
        if new is None:
            reason = why_not(layer, format, matrix.stored.scheme) or ""
            problems.append(_refusal(reason, [layer], _other_format([layer])))
        elif new.stores_input_scale and new.input != matrix.stored.scheme.input:
            unmeasured.append(layer)
    if unmeasured:
        first, stored = unmeasured[0], unmeasured[0].stored.scheme
        assert stored is not None
        problems.append(
            f"{first.name} {list(first.shape)} and {len(unmeasured) - 1} more are {stored.name}, which says nothing of "
            f"inputs as {recipe.label} stores them, and a conversion measures none. Use roundel quantize, or a scheme "
            "that scales inputs at run time or not at all."
        )
    for reason, layers in refused.items():
        problems.append(_inexact(reason, layers, format, own=recipe.converts_as_stored))
    return choices


def _inexact(reason: str, layers: Sequence[Layer], format: Format, own: bool) -> str:
    """Why layers cannot move to a format, and what can be done. own: whether the scheme was left to us."""
    others = f" (and {len(layers) - 1} more)" if len(layers) > 1 else ""
    fits = {
        f.name: [exact_scheme(layer, f, None, None) for layer in layers]
        for f in FORMATS.values()
        if f.writes and f.keeps_codes
    }
    possible = [name for name, schemes in fits.items() if None not in schemes]
    sure = [name for name in possible if all(map(_surely, layers, fits[name]))]
    holding = [name for name in sure or possible if name != format.name]
    remedy = "Pass"
    if not own and format.name in possible:
        remedy = "Leave --scheme out, or pass"
    elif holding:
        remedy = f"Convert to {_listed(holding)}, or pass"
    first = layers[0]
    stored = first.stored.scheme
    assert stored is not None
    return (
        f"{first.name} {list(first.shape)}{others} is {stored.name}: {reason}. {remedy} --requantize to round what it "
        "decodes to anew."
    )


def _surely(layer: Layer, scheme: Scheme | None) -> bool:
    """Whether a scheme holds a stored layer whatever its numbers are."""
    stored = layer.stored.scheme
    return stored is not None and scheme is not None and is_certain(stored.weight, scheme.weight)


def _unmatched(option: str, pattern: str, linear: Sequence[str], choices: Mapping[str, Choice]) -> str:
    kept = sorted(matches(pattern, choices))
    if kept:
        return (
            f"{option} {pattern!r} matches only matrices that are kept, such as {kept[0]} ({choices[kept[0]].origin}). "
            "Name one exactly to round it all the same."
        )
    tails = Counter(name.rpartition(".")[2] for name in linear)
    known = ", ".join(sorted(tails)[:12])
    return f"{option} {pattern!r} matches no layer.{nearest(pattern, (*tails, *linear))} Layers end in {known}."


def layers_of(
    matrices: Mapping[str, Matrix],
    choices: Mapping[str, Choice],
    formats: Sequence[Format],
    recipe: Recipe,
    problems: list[str],
) -> list[Layer]:
    """The layers that are rounded, on the grids of their formats; what transforms, the algorithm or a format refuse is
    added to the problems."""
    algorithm = recipe.chain.algorithm
    layers: list[Layer] = []
    refused: dict[tuple[str, str], list[Layer]] = {}
    for matrix in matrices.values():
        scheme = choices[matrix.name].scheme
        if scheme is None:
            continue
        for format in formats:
            scheme = format.grid_of(scheme)
        layer = _arranged(matrix.layer(scheme), algorithm.permutes, formats)
        layers.append(layer)
        reasons = [
            *((step.name, step.refuse(layer)) for step in recipe.chain.transforms),
            (algorithm.name, None if recipe.conversion and layer.moves else algorithm.refuse(layer)),
            *((f.name, f.refuse(layer)) for f in formats),
        ]
        for who, reason in reasons:
            if reason is not None:
                refused.setdefault((who, reason), []).append(layer)
    steps = {step.name for step in recipe.chain.steps}
    for (who, reason), refused_layers in refused.items():
        remedy = _other_step(who, refused_layers) if who in steps else _other_format(refused_layers)
        problems.append(_refusal(reason, refused_layers, remedy))
    return layers


def _arranged(layer: Layer, permutes: bool, formats: Sequence[Format]) -> Layer:
    """The layer with its groups: as the algorithm makes them, or as they are stored, where codes can move over."""
    permuted = replace(layer, permuted=True)
    keeps = layer.stored.permuted and permuted.moves and all(f.refuse(permuted) is None for f in formats)
    return permuted if permutes or keeps else layer


def _refusal(reason: str, layers: Sequence[Layer], remedy: str) -> str:
    first, more = layers[0], len(layers) - 1
    others = f" (and {more} more)" if more else ""
    return (
        f"{first.name} {list(first.shape)}{others}: {reason}. {remedy}, or change these layers with --layer-config or "
        "--ignore-layers."
    )


def _other_format(layers: Sequence[Layer]) -> str:
    written = [f for f in FORMATS.values() if f.writes and f.keeps_codes]
    storing = [f.name for f in written if all(f.refuse(layer) is None for layer in layers)]
    return f"Use format {_listed(storing)}" if storing else "Choose another scheme"


def _other_step(name: str, layers: Sequence[Layer]) -> str:
    """Instead of the algorithm, or the transform, that refuses these layers."""
    if name not in ALGORITHMS:
        return f"Leave {name} out"
    others = [a for a in ALGORITHMS.values() if a.name != name and all(a.refuse(layer) is None for layer in layers)]
    return f"Use algorithm {_listed([a.name for a in others])}" if others else "Choose another scheme"


def _listed(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def settle(formats: Sequence[Format], layers: Sequence[Layer], problems: list[str]) -> list[Format]:
    """Of each format the variant that fits all layers together; the problems of those that have none are added."""
    settled: list[Format] = []
    for format in formats:
        try:
            settled.append(format.settle(layers))
        except PlanError as error:
            problems.extend(error.problems)
    return settled
