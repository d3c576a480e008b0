"""Clipping ranges against an obvious search, group by group; queries and keys are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from algorithms.blocks import BLOCK
from roundel.ops.encode import encode_reference
from roundel.scheme import Grid, Scheme
from roundel.transforms.clip import SCORES, clipped
from transforms.units import moved, rounded, spacious


def slow(weight: Tensor, grid: Grid, x: Tensor, shares: list[float]) -> Tensor:
    """Every group of every row by itself."""
    found = weight.clone()
    width = grid.block[1] or weight.shape[1]
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], width):
            group, part = weight[row, start : start + width], x[:, start : start + width]
            best, kept = float("inf"), group
            for share in [1.0, *shares]:
                if grid.symmetric:
                    limit = float(group.abs().max()) * share
                    held = group.clamp(-limit, limit)
                else:
                    held = group.clamp(min(float(group.min()), 0) * share, max(float(group.max()), 0) * share)
                error = float((part @ (encode_reference(held[None], grid).decode()[0] - group)).square().sum())
                if error < best * (1 - 1e-5):
                    best, kept = error, held
            found[row, start : start + width] = kept
    return found


@pytest.mark.parametrize("scheme", ["W3A16G32", "W3A16G32_ASYM", "W4A16G-1", "W2A16G48", "MXFP4"])
@pytest.mark.parametrize("samples", [1, 8])
def test_the_best_range_of_each_group(scheme: str, samples: int) -> None:
    unit = spacious(scheme, samples=samples, hidden=64, inner=32, heads=2, kv_heads=1)
    seen: dict[str, list[Tensor]] = {}
    unit.entering().observe(lambda name, x: seen.setdefault(name, []).append(x), {}, stream="float")
    found = clipped(unit, "float", 4096, 20, 0.5)
    shares = [1 - step / 20 for step in range(1, 11)]
    tensor = f"{BLOCK}.self_attn.v_proj.weight"
    x = torch.cat(seen[f"{BLOCK}.self_attn.v_proj"])
    expected = slow(unit.weights[tensor], Scheme.parse(scheme).weight, x, shares)
    same = (found[tensor] - expected).abs() < 1e-5
    assert float(same.float().mean()) > 0.97  # all but ties between neighbouring ranges
    assert not torch.equal(found[tensor], unit.weights[tensor]) or scheme == "MXFP4"


def test_it_lowers_the_error_of_a_rounded_block() -> None:
    for scheme in ("W2A16G32", "W3A16G32_ASYM"):
        unit = spacious(scheme)
        held = {**unit.weights, **clipped(unit, "float", 512, 20, 0.5)}
        codes = {
            layer.tensor: encode_reference(held[layer.tensor], layer.scheme.weight).decode() for layer in unit.layers
        }
        assert moved(unit, {**held, **codes}) < 0.95 * moved(unit, rounded(unit))


def test_what_makes_scores_is_left_alone() -> None:
    unit = spacious()
    names = {name.removeprefix(f"{BLOCK}.").removesuffix(".weight") for name in clipped(unit, "float", 64, 20, 0.5)}
    assert names == {"self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    skipped = ("q_proj", "k_proj", "qkv_proj", "q_a_proj", "q_b_proj", "indexer.wq_b")
    assert all(SCORES.search(f"a.{name}") for name in skipped)
    assert not any(SCORES.search(f"a.{name}") for name in ("v_proj", "kv_b_proj", "o_proj", "w1", "down_proj"))


def test_an_expert_that_no_token_reaches_is_not_clipped() -> None:
    unit = spacious(experts=16, top_k=1, inner=32, samples=1, tokens=4)
    seen: set[str] = set()
    unit.entering().observe(lambda name, x: seen.add(name), {}, stream="float")
    found = {name.removesuffix(".weight") for name in clipped(unit, "float", 64, 20, 0.5)}
    assert found == {name for name in seen if not SCORES.search(name)}
    assert len(found) < len(unit.layers) - 2
