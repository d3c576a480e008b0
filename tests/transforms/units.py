"""Toy blocks with spaces, with outliers put in by scales that change nothing, and how far rounding moves a block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from algorithms.blocks import BLOCK, ToyActivations, make_unit, rebound
from roundel.families import family_of
from roundel.families.spaces import spaces_of
from roundel.ops.encode import encode_reference
from roundel.transforms.absorb import absorb
from roundel.unit import Space, Unit

__all__ = ["injected", "moved", "named", "rounded", "spacious"]

SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"kv_heads": 4, "bias": True},
    {"offset": 1.0},
    {"experts": 4, "shared": True, "inner": 32},
)


def spacious(scheme: str = "W4A16G32", **sizes: Any) -> Unit:
    """A toy block with the spaces its family states: Llama's, or Gemma's where norms have an offset."""
    unit = make_unit(scheme, **{"samples": 4, "inner": 96, **sizes})
    assert isinstance(unit.activations, ToyActivations)
    shape = unit.activations.shape
    family = family_of({"model_type": "gemma" if shape.offset else "llama"})
    return replace(
        unit, spaces=spaces_of(family, BLOCK, {n: tuple(w.shape) for n, w in unit.weights.items()}, shape.config)
    )


def injected(unit: Unit, factor: float = 32.0, every: int = 16) -> Unit:
    """The same function with every 16th channel or so of every space `factor` times as large, its columns as small."""
    generator = torch.Generator().manual_seed(1)
    weights: Mapping[str, Tensor] = unit.weights
    for space in unit.spaces:
        scale = torch.ones(space.size)
        scale[torch.randperm(space.size, generator=generator)[: max(1, space.size // every)]] = 1 / factor
        weights = absorb(weights, space, scale)
    return rebound(unit, weights)


def rounded(unit: Unit) -> dict[str, Tensor]:
    """The unit's tensors, its layers rounded plainly, by the definition."""
    return {
        **unit.weights,
        **{layer.tensor: encode_reference(unit.weight(layer), layer.scheme.weight).decode() for layer in unit.layers},
    }


def moved(unit: Unit, weights: Mapping[str, Tensor]) -> float:
    """How far other weights move the block's output, relative to what the block adds to its input."""
    entering = unit.entering()
    with torch.no_grad():
        x = entering.inputs(range(entering.samples), "float")
        exact = entering.forward(x, unit.weights)
        return float((entering.forward(x, weights) - exact).norm() / (exact - x).norm())


def named(unit: Unit, name: str) -> Space:
    """The space of a module below the block."""
    (found,) = (space for space in unit.spaces if space.name == f"{BLOCK}.{name}")
    return found
