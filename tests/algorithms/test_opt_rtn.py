"""Optimized RTN: less weighted error than plain rounding on every layer, and less error of outputs where it was told
what enters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from algorithms.blocks import BLOCK, ToyActivations, make_unit
from algorithms.fed import Fed
from roundel.algorithms.inputs import mean_squares
from roundel.algorithms.opt_rtn import OptRtn
from roundel.errors import RecipeError
from roundel.ops.encode import encode
from roundel.ops.fit import grouped
from roundel.scheme import ELEMENTS, Grid, Scheme
from roundel.unit import Layer, Stream, Unit

SCHEMES = [f"W{bits}A16G32{sym}" for bits in range(2, 9) for sym in ("", "_ASYM")] + ["W4A16G48", "MXFP4", "MXFP8"]


def entering(unit: Unit, stream: Stream = "quantized") -> dict[str, Tensor]:
    """All that enters each layer, [tokens, in]."""
    caught: dict[str, list[Tensor]] = {}
    unit.entering().observe(lambda name, x: caught.setdefault(name, []).append(x), unit.weights, stream=stream)
    return {name: torch.cat(x) for name, x in caught.items()}


def without_data(unit: Unit) -> Unit:
    return replace(unit, activations=None)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_less_error_than_plain_rounding_on_every_layer(scheme: str) -> None:
    unit = make_unit(scheme, samples=6)
    alike, counted = OptRtn().quantize(without_data(unit)), OptRtn(imatrix=True).quantize(unit)
    inputs = entering(unit)
    for layer in unit.layers:
        weight, importance = unit.weight(layer).double(), inputs[layer.name].double().square().mean(0)
        plain = (encode(unit.weight(layer), layer.scheme.weight).decode().double() - weight).square()
        one, other = ((f[layer.name].tensor.decode().double() - weight).square() for f in (alike, counted))
        assert alike[layer.name].error == pytest.approx(float(one.sum()), rel=1e-6)
        assert alike[layer.name].baseline == pytest.approx(float(plain.sum()), rel=1e-6)
        assert counted[layer.name].error == pytest.approx(float((other * importance).sum()), rel=1e-5)
        assert counted[layer.name].baseline == pytest.approx(float((plain * importance).sum()), rel=1e-5)
        assert one.sum() < plain.sum()
        assert (other * importance).sum() < (plain * importance).sum()
        assert (other * importance).sum() <= (one * importance).sum() * 1.0001
        assert alike[layer.name].tokens is None
        assert counted[layer.name].tokens == 6 * 32
        assert alike[layer.name].fallback is counted[layer.name].fallback is None


@pytest.mark.parametrize("scheme", ["W2A16G32", "W3A16G32_ASYM", "W4A16G32"])
def test_outputs_on_other_inputs_err_less(scheme: str) -> None:
    """What was searched for the mean squares of some inputs is better on others."""
    whole = make_unit(scheme, samples=24)
    assert isinstance(whole.activations, ToyActivations)
    unit, other = (
        replace(whole, activations=replace(whole.activations, streams={n: x[part] for n, x in streams.items()}))
        for part, streams in ((slice(8), whole.activations.streams), (slice(8, 24), whole.activations.streams))
    )
    x = entering(other)

    def lost(tensors: Mapping[str, Tensor]) -> float:
        return sum(float((x[la.name] @ (tensors[la.name] - unit.weight(la)).T).square().mean()) for la in unit.layers)

    plain = {la.name: encode(unit.weight(la), la.scheme.weight).decode() for la in unit.layers}
    alike = {name: r.tensor.decode() for name, r in OptRtn().quantize(without_data(unit)).items()}
    counted = {name: r.tensor.decode() for name, r in OptRtn(imatrix=True).quantize(unit).items()}
    assert lost(counted) < lost(alike) < lost(plain)


@pytest.mark.parametrize("imatrix", [False, True])
@pytest.mark.parametrize("scheme", ["W2A16G32", "W2A16G32_ASYM", "W3A16G-1", "W4A16G48"])
def test_unbiased_scales_keep_weights_as_long_as_they_are(scheme: str, imatrix: bool) -> None:
    unit = make_unit(scheme, samples=6)
    widened, found = (OptRtn(imatrix=imatrix, unbiased=u).quantize(unit) for u in (1.0, 0.0))
    inputs = entering(unit)
    for layer in unit.layers:
        ours, before = widened[layer.name], found[layer.name]
        weight, columns = unit.weight(layer).double(), layer.scheme.weight.block_of(layer.shape)[1]
        counted = inputs[layer.name].double().square().mean(0) if imatrix else torch.ones(layer.shape[1])
        length, met, short = (
            grouped(weight * other * counted, columns).sum(-1)
            for other in (weight, ours.tensor.decode().double(), before.tensor.decode().double())
        )
        assert torch.equal(ours.tensor.codes, before.tensor.codes)
        assert torch.allclose(met, length, rtol=2e-3)
        assert float((short / length).mean()) < 0.998
        assert before.error < ours.error
        assert ours.error == pytest.approx(
            float(((ours.tensor.decode().double() - weight).square() * counted).sum()), rel=1e-4
        )


@pytest.mark.parametrize("imatrix", [False, True])
def test_scales_of_2_bits_are_widened_by_a_quarter_unless_another_share_is_asked_for(imatrix: bool) -> None:
    unit = make_unit("W2A16G32", samples=6)
    least, asked, found, whole = (
        OptRtn(imatrix=imatrix, unbiased=share).quantize(unit) for share in (0.0, 0.25, None, 1.0)
    )
    for name, ours in found.items():
        assert torch.equal(ours.tensor.decode(), asked[name].tensor.decode())
        costs, all_costs = (each[name].error / least[name].error - 1 for each in (found, whole))
        assert 0 < costs < 0.02
        assert costs == pytest.approx(all_costs / 16, rel=0.05)  # the square of the share
        assert ours.error < ours.baseline == least[name].baseline


def test_a_quarter_is_not_taken_where_plain_rounding_is_better() -> None:
    """Weights that lie on the grid but for one: the search cannot beat plain rounding by what widening costs."""
    weight = torch.tensor([-2.0, -1.0, 0.0, 1.0]).repeat(8)[None].clone()
    weight[0, 0] = -2.001
    grid = Scheme.parse("W2A16G32").weight
    found, least, asked = (OptRtn(unbiased=share).search(weight, grid) for share in (None, 0.0, 1.0))
    assert torch.equal(found.tensor.decode(), least.tensor.decode())
    assert found.error == least.error <= least.baseline
    assert asked.error >= least.error


def test_at_3_bits_the_least_error_stands() -> None:
    unit = make_unit("W3A16G32", samples=6)
    found, least = OptRtn().quantize(unit), OptRtn(unbiased=0.0).quantize(unit)
    assert all(torch.equal(found[name].tensor.decode(), least[name].tensor.decode()) for name in found)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_0_to_1(share: float) -> None:
    with pytest.raises(RecipeError, match="0 to 1"):
        OptRtn(unbiased=share)


def test_mean_squares_are_of_the_quantized_stream() -> None:
    unit = make_unit(samples=5, noise=0.5)
    found = mean_squares(unit, "quantized")
    for stream, equal in (("quantized", True), ("float", False)):
        for name, x in entering(unit, stream).items():  # type: ignore[arg-type]
            expected = x.square().mean(0)
            assert torch.allclose(found[name].mean_square, expected, rtol=1e-5) == equal
            assert found[name].tokens == len(x)


def one_layer(scheme: str, parts: list[Tensor], weight: Tensor | None = None) -> tuple[Unit, Layer, Fed]:
    unit = make_unit(scheme)
    layer = unit.layers[0]
    fed = Fed({layer.name: parts})
    weights = {layer.tensor: unit.weight(layer) if weight is None else weight}
    return replace(unit, layers=(layer,), weights=weights, activations=fed), layer, fed  # type: ignore[arg-type]


def test_inputs_are_looked_at_once() -> None:
    parts = [torch.randn(40, 64), torch.randn(0, 64), torch.randn(60, 64)]
    unit, layer, fed = one_layer("W4A16G32", parts)
    assert OptRtn(imatrix=True).quantize(unit)[layer.name].tokens == 100
    assert fed.passes == [({layer.name}, set(unit.weights))]


@pytest.mark.parametrize(("tokens", "says"), [(0, "no token"), (63, "63 tokens reached it, fewer than 64")])
def test_a_layer_that_saw_little_is_searched_without_weights_and_says_so(tokens: int, says: str) -> None:
    unit, layer, _ = one_layer("W3A16G32_ASYM", [torch.randn(tokens, 64) * torch.logspace(-2, 2, 64)])
    found, alike = OptRtn(imatrix=True).quantize(unit)[layer.name], OptRtn().quantize(unit)[layer.name]
    assert found.fallback is not None
    assert says in found.fallback
    assert found.tokens == tokens
    assert torch.equal(found.tensor.codes, alike.tensor.codes)
    enough = OptRtn(imatrix=True, min_tokens=1).quantize(unit)[layer.name]
    assert (enough.fallback is None) == (tokens > 0)


@pytest.mark.parametrize("silent", ["one group", "a third of the channels", "all"])
def test_channels_that_were_silent(silent: str) -> None:
    """Their weights stay finite and near: auto-round gives such a channel the importance of an average one, and takes
    that from those that spoke."""
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 64)
    x[:, {"one group": slice(0, 32), "a third of the channels": slice(0, 64, 3), "all": slice(None)}[silent]] = 0
    unit, layer, _ = one_layer("W3A16G32", [x])
    found = OptRtn(imatrix=True).quantize(unit)[layer.name]
    weight, decoded = unit.weight(layer), found.tensor.decode()
    assert (decoded - weight).square().sum() < 0.2 * weight.square().sum()
    if silent == "all":
        assert torch.equal(found.tensor.codes, OptRtn().quantize(unit)[layer.name].tensor.codes)
        return
    spoke = x.square().mean(0)
    averaged = torch.where(spoke > 0, spoke, spoke[spoke > 0].mean())
    theirs = OptRtn(imatrix=True).quantize(one_layer("W3A16G32", [averaged.sqrt().expand(100, 64)])[0])[layer.name]
    ours = (found.tensor.decode() - weight).square() * spoke
    assert ours.sum() <= ((theirs.tensor.decode() - weight).square() * spoke).sum() * 1.0001


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_any_dtype_are_searched_in_float32(dtype: torch.dtype) -> None:
    weight = (torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) * 0.1).to(dtype)
    unit, layer, _ = one_layer("W4A16G32_ASYM", [], weight)
    wide, _, _ = one_layer("W4A16G32_ASYM", [], weight.float())
    found, expected = (OptRtn().quantize(u)[layer.name] for u in (unit, wide))
    assert torch.equal(found.tensor.codes, expected.tensor.codes)
    assert found.error == expected.error
    assert unit.weights[layer.tensor].dtype == dtype


def test_routed_experts_are_searched_too() -> None:
    """auto-round leaves out layers that have "expert" in their name; and it has no search for 8 bits."""
    unit = make_unit("W8A16G32", experts=4, inner=64, samples=8)
    found = OptRtn(imatrix=True, min_tokens=8).quantize(unit)
    for layer in unit.layers:
        assert found[layer.name].error < found[layer.name].baseline  # type: ignore[operator]
        assert found[layer.name].fallback is None


def test_data_is_read_only_where_it_is_asked_for() -> None:
    assert not OptRtn().reads_activations
    assert not OptRtn(imatrix=True).reads_float_stream
    assert OptRtn(imatrix=True).reads_activations
    assert (OptRtn().passes(128, 8), OptRtn(imatrix=True).passes(128, 8)) == (0, 1)


def test_refusals() -> None:
    layer = make_unit().layers[0]

    def asked(grid: Grid) -> str | None:
        return OptRtn().refuse(replace(layer, scheme=Scheme(name="THIS", weight=grid)))

    int4 = layer.scheme.weight
    e4m3 = Grid(element=ELEMENTS["e4m3"], block=(0, 0), scale="F32")
    assert asked(int4) is None
    assert asked(Grid(element=ELEMENTS["e2m1"], block=(1, 16), scale=e4m3)) is None
    for grid in (replace(int4, block=(128, 128)), replace(int4, scale=e4m3), e4m3, replace(int4, block=(0, 0))):
        assert "not to THIS" in str(asked(grid))
    with pytest.raises(RecipeError, match="min_tokens=0"):
        OptRtn(min_tokens=0)
    assert BLOCK in layer.name
