"""Trained scales: better than none on the block's own output, at the layer's real grid; a loop of one's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from algorithms.blocks import BLOCK, ToyActivations
from roundel.errors import RecipeError
from roundel.ops.encode import encode_reference
from roundel.scheme import Scheme
from roundel.transforms.teq import Teq, Training
from roundel.unit import Unit
from transforms.units import SHAPES, injected, moved, named, rounded, spacious

FEW = Teq(steps=20, lr=0.03, batch_size=2)


def error(unit: Unit, weights: dict[str, torch.Tensor]) -> float:
    """The loss TEQ trains on, over all samples: the rounded block on the quantized stream, against the target."""
    entering = unit.entering()
    samples = range(entering.samples)
    with torch.no_grad():
        return float(
            (entering.forward(entering.inputs(samples), weights) - entering.inputs(samples, "target")).square().mean()
        )


@pytest.mark.parametrize("sizes", SHAPES)
def test_function_is_kept_and_most_of_what_outliers_cost_comes_back(sizes: dict[str, Any]) -> None:
    plain = spacious("W3A16G32_ASYM", **sizes)
    unit = injected(plain)
    transformed = FEW.apply(unit)
    assert moved(unit, transformed.unit.weights) < 1e-5
    lost = moved(unit, rounded(unit)) - moved(plain, rounded(plain))
    assert lost > 0.05
    assert moved(unit, rounded(unit)) - moved(unit, rounded(transformed.unit)) > 0.9 * lost
    assert set(transformed.notes) == {s.name for s in unit.spaces}


def test_training_gains_on_the_closed_form_and_on_nothing() -> None:
    unit = spacious("W3A16G32")
    start = Teq(steps=1, lr=1e-12, batch_size=4).apply(unit).unit
    trained = Teq(steps=60, lr=0.02, batch_size=4).apply(unit).unit
    alone = Teq(steps=60, lr=0.05, batch_size=4, smooth_start=False).apply(unit).unit
    assert error(unit, rounded(trained)) < 0.95 * error(unit, rounded(start)) < error(unit, rounded(unit))
    assert error(unit, rounded(alone)) < 0.9 * error(unit, rounded(unit))


def test_never_worse_than_no_scales() -> None:
    """A rate that breaks everything leaves things as they were."""
    unit = spacious("W4A16G32")
    transformed = Teq(steps=10, lr=1e4, batch_size=4, smooth_start=False).apply(unit)
    assert all(transformed.unit.weights[n] is w for n, w in unit.weights.items())
    assert set(transformed.notes.values()) == {"kept: no scale has a smaller error"}


@pytest.mark.parametrize("scheme", ["W2A16G32", "W3A16G32_ASYM", "W8A16G32", "MXFP4"])
def test_trials_are_at_the_layers_own_bits(scheme: str) -> None:
    """Intel Neural Compressor's last step is at 4 bits whatever was asked for."""
    unit = spacious(scheme)
    keep = Scheme.parse("W8A16")
    unit = replace(unit, layers=tuple(replace(x, scheme=keep) if x.name.endswith("o_proj") else x for x in unit.layers))
    trial = Training(unit).weights()
    for layer in unit.layers:
        expected = encode_reference(unit.weight(layer), layer.scheme.weight).decode()
        assert torch.allclose(trial[layer.tensor], expected, atol=1e-6)


def test_a_loop_of_ones_own() -> None:
    """Another loss, another optimizer: only `parameters`, `weights` and `finish` are needed."""
    unit = injected(spacious("W3A16G32"))
    entering = unit.entering()
    training = Training(unit)
    assert [p.shape[0] for p in training.parameters()] == [s.size for s in unit.spaces]
    optimizer = torch.optim.SGD(training.parameters(), lr=2.0)
    x = entering.inputs(range(4), "float")
    with torch.no_grad():
        target = entering.forward(x, unit.weights)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (entering.forward(x, training.weights()) - target).abs().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in training.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    finished = training.finish()
    assert moved(unit, finished.unit.weights) < 1e-5
    assert moved(unit, rounded(finished.unit)) < moved(unit, rounded(unit))
    name = named(unit, "mlp.up_proj").readers[0]
    learnt = training.state()[f"{BLOCK}.mlp.up_proj"].exp()
    assert torch.allclose(finished.unit.weights[f"{name}.weight"], unit.weights[f"{name}.weight"] * learnt)
    assert not finished.unit.weights[f"{name}.weight"].requires_grad


def test_the_same_comes_out_twice_and_another_seed_differs() -> None:
    unit = spacious("W3A16G32", samples=8)
    first, again, other = (Teq(steps=12, lr=0.05, batch_size=2, seed=s).apply(unit).unit.weights for s in (1, 1, 2))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)
    assert isinstance(unit.activations, ToyActivations)
    assert [done for done, _ in unit.activations.ticks][:12] == [step / 12 for step in range(1, 13)]


def test_spaces_that_do_not_hold_are_not_trained() -> None:
    unit = spacious("W3A16G32")
    bad = replace(named(unit, "input_layernorm"), readers=named(unit, "input_layernorm").readers[:2])
    unit = replace(unit, spaces=(bad, *unit.spaces[1:]))
    transformed = FEW.apply(unit)
    assert transformed.notes[bad.name].startswith("dropped: ")
    assert moved(unit, transformed.unit.weights) < 1e-5
    none = replace(unit, spaces=(bad,))
    assert all(FEW.apply(none).unit.weights[n] is w for n, w in none.weights.items())


@pytest.mark.parametrize("change", [{"steps": 0}, {"lr": 0.0}, {"beta1": 1.0}, {"warmup": -0.1}, {"batch_size": 0}])
def test_values_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(change))):
        Teq(**change)
