"""AWQ against an obvious search, at the layer's real grid; what it recovers; what it leaves and says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from algorithms.blocks import BLOCK, ToyActivations
from roundel.errors import RecipeError
from roundel.ops.encode import encode_reference
from roundel.scheme import Scheme
from roundel.transforms import awq as module
from roundel.transforms.awq import Awq
from roundel.transforms.transform import Transformed
from roundel.unit import Unit
from transforms.units import SHAPES, injected, moved, named, rounded, spacious


def slow(unit: Unit, name: str, parent: str, duo: bool, n_grid: int) -> tuple[float, Tensor]:
    """(smallest error relative to unscaled, scale) of a space whose readers see the same numbers, by plain loops."""
    space, entering = named(unit, name), unit.entering()
    seen: dict[str, list[Tensor]] = {}
    entering.observe(lambda n, x: seen.setdefault(n, []).append(x), {}, stream="float")
    inputs = torch.cat(seen[space.readers[0]]).abs().mean(0)
    relative = []
    for reader in space.readers:
        weight = unit.weights[f"{reader}.weight"]
        grid = Scheme.parse("W3A16G32").weight
        for row in weight.abs():
            for group in row.split(grid.block[1]):
                relative.append(group / (group.max() + 1e-6))
    weights = torch.cat(relative).view(-1, space.size).mean(0)
    call = entering.calls(f"{BLOCK}.{parent}", range(entering.samples), "float")

    def error(scale: Tensor) -> float:
        trial = {
            f"{r}.weight": encode_reference(unit.weights[f"{r}.weight"] * scale, grid).decode() / scale
            for r in space.readers
        }
        return float((entering.call(call, trial) - entering.call(call, {})).square().sum())

    best, kept = error(torch.ones(space.size)), torch.ones(space.size)
    plain = best
    for step in range(1, n_grid + 1):
        ratio = step / n_grid
        scale = inputs**ratio / (weights ** (1 - ratio) + 1e-4) if duo else inputs**ratio
        scale = scale / (scale.max() * scale.min()).sqrt()
        found = error(scale)
        if found < best:
            best, kept = found, scale
    return best / plain, kept


@pytest.mark.parametrize(("name", "parent"), [("input_layernorm", "self_attn"), ("mlp.up_proj", "mlp.down_proj")])
@pytest.mark.parametrize("duo", [True, False])
def test_the_scale_of_smallest_error(name: str, parent: str, duo: bool) -> None:
    unit = spacious("W3A16G32")
    ratio, scale = slow(unit, name, parent, duo, 7)
    transformed = Awq(n_grid=7, duo_scaling=duo, clip=False).apply(unit)
    assert f"error {ratio:.3g} of unscaled" in transformed.notes[f"{BLOCK}.{name}"]
    assert ratio < 0.95
    reader = f"{named(unit, name).readers[0]}.weight"
    found = transformed.unit.weights[reader]
    assert torch.allclose(found, unit.weights[reader] * scale, rtol=0.02)  # norms are in bfloat16: see `storable`


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("scheme", ["W4A16G32", "W3A16G32_ASYM"])
def test_function_is_kept_and_most_of_what_outliers_cost_comes_back(scheme: str, sizes: dict[str, Any]) -> None:
    plain = spacious(scheme, **sizes)
    unit = injected(plain)
    transformed = Awq(clip=False, n_grid=8).apply(unit)
    assert moved(unit, transformed.unit.weights) < 1e-5
    lost = moved(unit, rounded(unit)) - moved(plain, rounded(plain))
    assert lost > 0.05
    left = moved(unit, rounded(transformed.unit))
    assert moved(unit, rounded(unit)) - left > 0.9 * lost
    assert moved(unit, rounded(Awq(n_grid=8).apply(unit).unit)) < left, "clipping gains on top"
    assert set(transformed.notes) == {s.name for s in unit.spaces}


@pytest.mark.parametrize("scheme", ["W2A16G32", "W3A16G32", "W8A16G32_ASYM", "MXFP4"])
def test_trials_are_at_the_layers_own_bits(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Intel Neural Compressor's search is at 4 bits whatever is asked for."""
    grids: set[object] = set()
    real = module.round_trip
    monkeypatch.setattr(module, "round_trip", lambda weight, grid: grids.add(grid) or real(weight, grid))
    unit = spacious(scheme)
    keep = Scheme.parse("W8A16")
    layers = tuple(replace(x, scheme=keep) if x.name.endswith("o_proj") else x for x in unit.layers)
    transformed = Awq(clip=False, n_grid=4).apply(replace(unit, layers=layers))
    assert grids == {Scheme.parse(scheme).weight, keep.weight}
    errors = [float(note.split("error ")[1].split()[0]) for note in transformed.notes.values() if "error 0" in note]
    assert all(error < 1 for error in errors)
    assert errors or scheme == "MXFP4"


def test_where_rounding_costs_nothing_nothing_is_scaled() -> None:
    unit = spacious("W8A16G32")
    exact = {
        n: torch.randint(-127, 128, w.shape, generator=torch.Generator().manual_seed(0)) / 128
        for n, w in unit.weights.items()
    }
    for weight in exact.values():
        weight[..., ::32] = -1  # the largest of every group, on the lowest code
    assert isinstance(unit.activations, ToyActivations)
    unit = replace(unit, weights=exact, activations=replace(unit.activations, own=exact))
    transformed = Awq(clip=False, n_grid=3).apply(unit)
    assert moved(unit, rounded(unit)) == 0
    assert set(transformed.notes.values()) == {"kept: no scale has a smaller error"}
    assert all(transformed.unit.weights[n] is w for n, w in exact.items())


def test_routers_are_scaled_and_never_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = injected(spacious(experts=4, inner=32))
    shapes: list[tuple[int, ...]] = []
    real = module.round_trip
    monkeypatch.setattr(module, "round_trip", lambda weight, grid: shapes.append(weight.shape) or real(weight, grid))
    transformed = Awq(clip=False, n_grid=4).apply(unit)
    router = f"{BLOCK}.mlp.gate.weight"
    norm = f"{BLOCK}.post_attention_layernorm.weight"
    scale = unit.weights[norm] / transformed.unit.weights[norm]
    assert float((scale - 1).abs().max()) > 0.1
    assert torch.allclose(transformed.unit.weights[router], unit.weights[router] * scale, rtol=1e-5)
    assert (4, 64) not in shapes
    assert _choices(unit, unit.weights) == _choices(unit, transformed.unit.weights)


def _choices(unit: Unit, weights: Mapping[str, Tensor]) -> list[int]:
    logits: list[Tensor] = []
    router = f"{BLOCK}.mlp.gate"
    unit.entering().observe(
        lambda name, x: logits.append(x @ weights[f"{router}.weight"].T), weights, modules={router}, stream="float"
    )
    return torch.cat(logits).argmax(-1).tolist()


def test_a_space_that_does_not_hold_is_dropped_and_the_others_are_used() -> None:
    unit = injected(spacious())
    bad = replace(named(unit, "input_layernorm"), readers=named(unit, "input_layernorm").readers[:2])
    unit = replace(unit, spaces=(bad, *unit.spaces[1:]))
    transformed = Awq(clip=False, n_grid=4).apply(unit)
    assert transformed.notes[bad.name].startswith("dropped: ")
    assert transformed.unit.weights[f"{bad.name}.weight"] is unit.weights[f"{bad.name}.weight"]
    assert sum("ratio" in note for note in transformed.notes.values()) == 3
    assert moved(unit, transformed.unit.weights) < 1e-5


def test_an_expert_that_no_token_reaches_is_left_and_reported() -> None:
    unit = spacious(experts=16, top_k=1, inner=32, samples=1, tokens=4)
    transformed = Awq(n_grid=2).apply(unit)
    skipped = [name for name, note in transformed.notes.items() if note == "skipped: no token reached it"]
    assert 12 <= len(skipped) < 16
    for name in skipped:
        tensor = name.replace("up_proj", "down_proj") + ".weight"
        assert transformed.unit.weights[tensor] is unit.weights[tensor]
    assert all(bool(torch.isfinite(w).all()) for w in transformed.unit.weights.values())


def test_nothing_is_changed_in_place_and_the_same_comes_out_twice() -> None:
    unit = spacious()
    before = {name: w.clone() for name, w in unit.weights.items()}
    first: Transformed = Awq(n_grid=3).apply(unit)
    again = Awq(n_grid=3).apply(unit)
    assert all(torch.equal(unit.weights[n], w) for n, w in before.items())
    assert all(torch.equal(first.unit.weights[n], again.unit.weights[n]) for n in before)
    assert first.notes == again.notes


@pytest.mark.parametrize(
    "change", [{"n_grid": 0}, {"duo_scaling": "yes"}, {"max_shrink": 1.0}, {"stream": "target"}, {"search_tokens": -1}]
)
def test_values_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(change))):
        Awq(**change)
    assert Awq().reads_float_stream
    assert not Awq(stream="quantized").reads_float_stream
