"""Trial rounding is rounding, at the layer's own grid, and its gradient is what its docstring says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from algorithms.blocks import make_unit
from roundel.ops.encode import encode_reference
from roundel.scheme import Scheme
from roundel.transforms.trial import refusal, round_trip, straight_through

SCHEMES = ("W2A16G32", "W3A16", "W4A16G-1", "W8A16G64", "W2A16G32_ASYM", "W4A16_ASYM", "MXFP4", "MXFP8")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [128, 96])
def test_round_trip_is_encode_and_decode(scheme: str, width: int) -> None:
    weight = torch.randn(16, width, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    grid = Scheme.parse(scheme).weight
    assert torch.equal(round_trip(weight, grid), encode_reference(weight, grid).decode())
    assert torch.allclose(straight_through(weight, grid), encode_reference(weight, grid).decode(), atol=1e-6)


@pytest.mark.parametrize("scheme", ["W3A16G32", "W3A16G32_ASYM"])
def test_the_gradient_is_that_of_rounding_with_its_codes_held(scheme: str) -> None:
    """Against finite differences of w + scale(w) * (codes added by rounding), which stay as they are at w."""
    grid = Scheme.parse(scheme).weight
    weight = torch.randn(2, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    toward = torch.randn(2, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def span(w: torch.Tensor) -> torch.Tensor:
        if grid.symmetric:
            return w.abs().amax(-1, keepdim=True) / 4
        return (w.amax(-1, keepdim=True).clamp(min=0) - w.amin(-1, keepdim=True).clamp(max=0)) / 7

    added = (encode_reference(weight, grid).decode().double() - weight) / span(weight)
    expected = torch.empty_like(weight)
    for index in range(weight.numel()):
        step = torch.zeros(64, dtype=torch.float64)
        step[index] = 1e-6
        ends = [weight + sign * step.view(2, 32) for sign in (1, -1)]
        high, low = (((w + span(w) * added) * toward).sum() for w in ends)
        expected.view(-1)[index] = (high - low) / 2e-6
    found = weight.float().requires_grad_()
    (straight_through(found, grid) * toward.float()).sum().backward()
    assert found.grad is not None
    assert torch.allclose(found.grad.double(), expected, atol=1e-4)
    assert not torch.allclose(expected, toward, atol=1e-2), "the range's own gradient is in it"


def test_a_grid_without_plain_rounding_is_refused() -> None:
    unit = make_unit("W4A16")
    assert refusal(unit.layers[0]) is None
    scheme = unit.layers[0].scheme
    blocks = replace(scheme, weight=replace(scheme.weight, block=(128, 128)))
    assert "not to W4A16" in (refusal(replace(unit.layers[0], scheme=blocks)) or "")
