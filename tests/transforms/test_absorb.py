"""Absorbed scales change nothing but the tensors of their space, and norms stay fit for their file."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from algorithms.blocks import BLOCK
from roundel.transforms.absorb import absorb, rows_of, storable
from roundel.unit import Space, Writer
from transforms.units import SHAPES, moved, named, spacious


@pytest.mark.parametrize("sizes", SHAPES)
def test_every_space_of_a_block_takes_any_positive_scale(sizes: dict[str, Any]) -> None:
    unit = spacious(**sizes)
    assert len(unit.spaces) == (8 if "experts" in sizes else 4)
    generator = torch.Generator().manual_seed(0)
    for space in unit.spaces:
        scale = torch.exp(torch.randn(space.size, generator=generator))
        weights = absorb(unit.weights, space, scale)
        assert moved(unit, weights) < 1e-6
        assert moved(unit, absorb(unit.weights, space, scale, writers=False)) > 1e-3
        touched = {w.tensor for w in space.writers} | {f"{r}.weight" for r in space.readers}
        assert {name for name in weights if weights[name] is not unit.weights[name]} == touched


def test_what_it_does_to_each_tensor() -> None:
    unit = spacious(offset=1.0, experts=4)
    norm = named(unit, "post_attention_layernorm")
    scale = torch.linspace(0.5, 2, norm.size)
    weights = absorb(unit.weights, norm, scale)
    before = unit.weights[f"{BLOCK}.post_attention_layernorm.weight"]
    assert torch.equal(weights[f"{BLOCK}.post_attention_layernorm.weight"], (1 + before) / scale - 1)
    # AutoAWQ leaves the router as it was, so that tokens go to other experts.
    router = f"{BLOCK}.mlp.gate.weight"
    assert torch.equal(weights[router], unit.weights[router] * scale)
    values = named(unit, "self_attn.v_proj")  # 2 heads of values, each read by 2 heads of queries
    assert (values.size, values.head, values.repeat) == (32, 16, 2)
    scale = torch.arange(1.0, 33)
    weights = absorb(unit.weights, values, scale)
    assert torch.equal(
        weights[f"{BLOCK}.self_attn.v_proj.weight"], unit.weights[f"{BLOCK}.self_attn.v_proj.weight"] / scale[:, None]
    )
    columns = torch.cat([scale[:16], scale[:16], scale[16:], scale[16:]])
    assert torch.equal(
        weights[f"{BLOCK}.self_attn.o_proj.weight"], unit.weights[f"{BLOCK}.self_attn.o_proj.weight"] * columns
    )


@pytest.mark.parametrize(
    ("writer", "rows"),
    [
        (Writer(tensor="t"), [0, 1, 2, 3]),
        (Writer(tensor="t", start=6), [6, 7, 8, 9]),  # the end of a fused matrix
        (Writer(tensor="t", start=3, run=2, step=5), [3, 4, 8, 9]),  # the end of each head's rows
    ],
)
def test_rows_that_write_channels(writer: Writer, rows: list[int]) -> None:
    weights = {"t": torch.arange(1.0, 21).view(10, 2), "r.weight": torch.ones(3, 4)}
    assert rows_of(weights["t"], writer, 4).tolist() == rows
    space = Space(name="t", size=4, writers=(writer,), readers=("r",), parent="r")
    scale = torch.tensor([2.0, 4.0, 8.0, 16.0])
    found = absorb(weights, space, scale)
    factor = torch.ones(10)
    factor[rows] = scale
    assert torch.equal(found["t"], weights["t"] / factor[:, None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_divided_by_a_storable_scale_fits_its_dtype(dtype: torch.dtype, offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = (torch.randn(256, generator=generator) * 0.2 + 1 - offset).to(dtype).float()
    norm[7] = -offset  # a dead channel
    weights = {"n": norm, "r.weight": torch.randn(8, 256, generator=generator)}
    space = Space(name="n", size=256, writers=(Writer(tensor="n", offset=offset),), readers=("r",), parent="r")
    asked = torch.exp(torch.randn(256, generator=generator))
    scale = storable(weights, space, asked)
    assert torch.allclose(scale, asked, rtol=0.02)
    found = absorb(weights, space, scale)["n"]
    assert torch.allclose(found.to(dtype).float(), found, rtol=1e-6, atol=1e-7)
    careless = absorb(weights, space, asked)["n"]
    assert not torch.allclose(careless.to(dtype).float(), careless, rtol=1e-5, atol=1e-6)


def test_scales_of_matrices_and_of_float32_norms_are_taken_as_they_are() -> None:
    unit = spacious()
    space = named(unit, "mlp.up_proj")
    scale = torch.linspace(0.7, 1.3, space.size)
    assert storable(unit.weights, space, scale) is scale
    norm = named(unit, "input_layernorm")
    weights = {**unit.weights, norm.writers[0].tensor: torch.linspace(0.1, 1.1, norm.size)}
    scale = torch.linspace(0.7, 1.3, norm.size)
    assert storable(weights, norm, scale) is scale
