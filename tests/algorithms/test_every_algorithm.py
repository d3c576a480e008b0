"""What every algorithm owes, asked of all that are registered: a new one is tested here without a line of its own."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from algorithms.blocks import make_unit
from roundel.algorithms import ALGORITHMS, Algorithm, Rounded
from roundel.errors import RecipeError
from roundel.ops.encode import encode
from roundel.unit import Unit

FEW_STEPS = {"iters": 6}  # values for fields that cost time, where an algorithm has them
SCHEMES = [
    *(f"W{bits}A16G32{sym}" for bits in (2, 3, 4, 8) for sym in ("", "_ASYM")),
    "W4A16G-1",
    "W4A16G48",  # does not divide 64
    "W5A16G16_ASYM",
    "MXFP4",
    "MXFP8",
]
SHAPES = {"dense": {}, "moe": {"experts": 4, "shared": True, "inner": 64}}


def quick(name: str) -> Algorithm:
    algorithm = ALGORITHMS[name]
    few = {f.name: FEW_STEPS[f.name] for f in fields(algorithm) if f.name in FEW_STEPS}  # type: ignore[arg-type]
    return replace(algorithm, **few)  # type: ignore[type-var]


def asked(name: str, scheme: str, **sizes: float) -> tuple[Unit, dict[str, Rounded]] | None:
    """The unit and what the algorithm makes of it; None where it refuses."""
    unit, algorithm = make_unit(scheme, samples=6, **sizes), quick(name)  # type: ignore[arg-type]
    reasons = {algorithm.refuse(layer) for layer in unit.layers}
    if reasons != {None}:
        assert all(reason is None or len(reason) > 10 for reason in reasons)
        return None
    if not algorithm.reads_activations:
        unit = replace(unit, activations=None)
    return unit, algorithm.quantize(unit)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_stays_on_the_grid_and_never_loses_to_plain_rounding(name: str, scheme: str, shape: str) -> None:
    found = asked(name, scheme, **SHAPES[shape])
    if found is None:
        assert scheme not in ("W4A16G32", "W4A16G32_ASYM") or name == "hqq"  # what everybody can do
        return
    unit, results = found
    assert results.keys() == {layer.name for layer in unit.layers}
    for layer in unit.layers:
        result, weight = results[layer.name], unit.weight(layer)
        decoded = result.tensor.decode()
        assert result.tensor.grid == layer.scheme.weight and decoded.shape == weight.shape
        assert bool(torch.isfinite(decoded).all()) and bool((decoded != 0).any())
        loss = float((decoded - weight).square().sum() / weight.square().sum())
        plain = float((encode(weight, layer.scheme.weight).decode() - weight).square().sum() / weight.square().sum())
        assert loss < max(20 * plain, 1e-9)  # moved for the output's sake, and still the same matrix
        if result.error is not None and result.baseline is not None:
            assert result.error <= result.baseline * (1 + 1e-5)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_does_the_same_twice_and_leaves_its_unit_alone(name: str) -> None:
    scheme = "W3A16G32_ASYM"
    first = asked(name, scheme)
    assert first is not None
    unit, one = first
    before = make_unit(scheme, samples=6).weights
    assert all(torch.equal(unit.weights[key], before[key]) for key in before)
    torch.manual_seed(99)  # whatever was drawn elsewhere
    second = asked(name, scheme)
    assert second is not None
    for layer in unit.layers:
        a, b = one[layer.name].tensor, second[1][layer.name].tensor
        assert torch.equal(a.codes, b.codes) and torch.equal(a.decode(), b.decode())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_rows_of_zeros_and_zero_points_that_formats_cannot_store(name: str) -> None:
    unit, algorithm = make_unit("W4A16G32_ASYM", samples=6), quick(name)
    layers = tuple(
        replace(layer, scheme=replace(layer.scheme, weight=replace(layer.scheme.weight, lowest_zero=1)))
        for layer in unit.layers
    )
    weights = {**unit.weights}
    target = layers[0].tensor
    weights[target] = weights[target].clone()
    weights[target][3] = 0
    weights[target][4] = weights[target][4].abs()  # no negative weight: the zero point wants to be 0
    unit = replace(unit, layers=layers, weights=weights)
    if not algorithm.reads_activations:
        unit = replace(unit, activations=None)
    found = algorithm.quantize(unit)[layers[0].name].tensor
    assert found.zero is not None and int(found.zero.min()) >= 1
    decoded = found.decode()
    assert float(decoded[3].abs().max()) < 1e-3 and float((decoded[4] - weights[target][4]).abs().max()) < 1.0


@pytest.mark.parametrize("name", ALGORITHMS)
def test_its_fields_are_what_a_command_line_can_give(name: str) -> None:
    for field in fields(ALGORITHMS[name]):  # type: ignore[arg-type]
        assert set(str(field.type).replace(" ", "").split("|")) <= {"int", "float", "bool", "str", "None"}, field.name
        text = type(ALGORITHMS[name]).__doc__ or ""
        assert f"    {field.name} " in text, f"{field.name} is not described"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_values_without_sense_are_refused(name: str) -> None:
    for field in fields(ALGORITHMS[name]):  # type: ignore[arg-type]
        if str(field.type) in ("int", "float"):
            with pytest.raises(RecipeError, match=name):
                replace(ALGORITHMS[name], **{field.name: -7})  # type: ignore[type-var]
