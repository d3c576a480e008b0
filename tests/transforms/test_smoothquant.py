"""SmoothQuant's closed form, dead channels, and what it recovers from outliers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from algorithms.blocks import BLOCK, ToyActivations, rebound
from roundel.errors import RecipeError
from roundel.transforms.smoothquant import SmoothQuant
from transforms.units import SHAPES, injected, moved, rounded, spacious


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_formula(alpha: float) -> None:
    unit = spacious()
    seen: dict[str, list[torch.Tensor]] = {}
    unit.entering().observe(lambda name, x: seen.setdefault(name, []).append(x), {})
    x = torch.cat(seen[f"{BLOCK}.mlp.down_proj"])
    name = f"{BLOCK}.mlp.down_proj.weight"
    weight = unit.weights[name]
    scale = torch.tensor(
        [float(x[:, j].abs().max()) ** alpha / float(weight[:, j].abs().max()) ** (1 - alpha) for j in range(96)]
    )
    found = SmoothQuant(alpha=alpha).apply(unit).unit.weights
    assert torch.allclose(found[name], weight * scale, rtol=1e-4)
    up = f"{BLOCK}.mlp.up_proj.weight"
    norm = f"{BLOCK}.post_attention_layernorm.weight"
    assert torch.allclose(
        found[up], unit.weights[up] / scale[:, None] * unit.weights[norm] / found[norm], rtol=1e-4
    )  # also a reader of the norm


@pytest.mark.parametrize("sizes", SHAPES)
def test_function_is_kept_and_most_of_what_outliers_cost_comes_back(sizes: dict[str, Any]) -> None:
    plain = spacious(**sizes)
    unit = injected(plain)
    assert moved(plain, unit.weights) < 1e-5
    transformed = SmoothQuant().apply(unit)
    assert moved(unit, transformed.unit.weights) < 1e-5
    lost = moved(unit, rounded(unit)) - moved(plain, rounded(plain))
    assert lost > 0.05
    assert moved(unit, rounded(unit)) - moved(unit, rounded(transformed.unit)) > 0.8 * lost
    assert set(transformed.notes) == {s.name for s in unit.spaces}


def test_channels_that_are_dead_or_ignored_keep_their_scale() -> None:
    unit = spacious()
    weights = dict(unit.weights)
    norm, up = f"{BLOCK}.input_layernorm.weight", f"{BLOCK}.mlp.up_proj.weight"
    weights[norm] = weights[norm].clone()
    weights[norm][5] = 0  # nothing enters channel 5
    weights[up] = weights[up].clone()
    weights[up][9] = 0
    down = f"{BLOCK}.mlp.down_proj.weight"
    weights[down] = weights[down].clone()
    weights[down][:, 11] = 0  # nobody reads channel 11
    unit = rebound(unit, weights)
    found = SmoothQuant().apply(unit).unit.weights
    assert all(bool(torch.isfinite(w).all()) for w in found.values())
    assert found[norm][5] == 0
    for name in ("q_proj", "k_proj"):
        tensor = f"{BLOCK}.self_attn.{name}.weight"
        assert torch.equal(found[tensor][:, 5], weights[tensor][:, 5])
    assert torch.equal(found[down][:, 9], weights[down][:, 9])
    assert moved(unit, found) < 1e-5


def test_an_expert_that_no_token_reaches_is_left_and_reported() -> None:
    unit = spacious(experts=4, inner=32)
    assert isinstance(unit.activations, ToyActivations)
    # All tokens the same: two experts see them all, two see none.
    same = {name: s[:1, :1].expand(s.shape) for name, s in unit.activations.streams.items()}
    unit = replace(unit, activations=replace(unit.activations, streams=same))
    transformed = SmoothQuant().apply(unit)
    skipped = [name for name, note in transformed.notes.items() if note == "skipped: no token reached it"]
    assert len(skipped) == 2
    for name in skipped:
        tensor = name.replace("up_proj", "down_proj") + ".weight"
        assert transformed.unit.weights[tensor] is unit.weights[tensor]


def test_alpha_is_checked() -> None:
    with pytest.raises(RecipeError, match=r"alpha=1.5"):
        SmoothQuant(alpha=1.5)
