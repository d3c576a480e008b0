"""Rounding matrices that a format stores in parts (`Format.cuts`): each part by itself, head by head where something is
known of these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from roundel.algorithms import Algorithm, Rounded, Rtn
from roundel.matrices import finite
from roundel.tensor import below_each_other
from roundel.unit import Inputs, Layer, Unit

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["round_part", "with_parts"]

NOT_MEASURED = "a part of a matrix, whose inputs are not measured: rounded to nearest"


def round_part(algorithm: Algorithm, layer: Layer, weight: Tensor, heads: Sequence[Inputs]) -> Rounded:
    """A layer that is a part of a matrix (`Layer.cut`), by an algorithm that looks at no data.

    heads   what entered each of its heads, where that is known: they are rounded one by one
    """
    if not heads:
        unit = Unit(name=layer.name, layers=(layer,), weights={layer.tensor: weight})
        return algorithm.quantize(unit)[layer.name]
    rows = layer.shape[0] // len(heads)
    one = replace(layer, shape=(rows, layer.shape[1]))
    found: list[Rounded] = []
    for head, inputs in enumerate(heads):
        part = {layer.tensor: weight[head * rows : (head + 1) * rows]}
        unit = Unit(name=layer.name, layers=(one,), weights=part, known={layer.name: inputs})
        found.append(algorithm.quantize(unit)[layer.name])
    errors = [(each.error, each.baseline) for each in found if each.error is not None and each.baseline is not None]
    return replace(
        found[0],
        tensor=below_each_other([each.tensor for each in found]),
        error=sum(error for error, _ in errors) if len(errors) == len(found) else None,
        baseline=sum(baseline for _, baseline in errors) if len(errors) == len(found) else None,
        fallback=next((each.fallback for each in found if each.fallback is not None), None),
    )


def with_parts(
    unit: Unit, parts: Sequence[Layer], heads: Callable[[Layer], Sequence[Inputs]]
) -> tuple[Unit, dict[str, Rounded]]:
    """A unit whose matrices that are stored in parts are rounded, to nearest: what enters a part is not what enters a
    module of the model, so it is not measured. Layers that are rounded afterwards meet the rounded ones.

    heads   what is known from a file of what entered the heads of a part
    Raises NumericsError for weights that are not finite.
    """
    weights, rounded = dict(unit.weights), {}
    for layer in parts:
        assert layer.cut is not None, layer.name
        whole = f"{layer.cut.of}.weight"
        weight = finite(layer, layer.cut.take(unit.weights[whole]).float())
        known = heads(layer)
        result = round_part(Rtn(), layer, weight, known)
        rounded[layer.name] = result if known else replace(result, note=NOT_MEASURED)
        if weights[whole] is unit.weights[whole]:
            weights[whole] = unit.weights[whole].float().clone()
        layer.cut.put(result.tensor.decode(), weights[whole])
        weights[layer.tensor] = weight
    return replace(unit, weights=weights), rounded
