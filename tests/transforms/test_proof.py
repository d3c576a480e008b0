"""A space that does not hold is dropped by name; sound ones pass, even where a residual stream drowns them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from algorithms.blocks import BLOCK, ToyActivations
from roundel.transforms.proof import prove
from roundel.unit import Unit
from transforms.units import SHAPES, named, spacious


def _with(unit: Unit, name: str, **changes: Any) -> Unit:
    space = named(unit, name)
    return replace(unit, spaces=tuple(replace(s, **changes) if s is space else s for s in unit.spaces))


@pytest.mark.parametrize("sizes", [*SHAPES, {"experts": 16, "top_k": 1, "inner": 32}])
def test_sound_spaces_hold(sizes: dict[str, Any]) -> None:
    unit = spacious(**sizes)
    proven, notes = prove(unit)
    assert proven.spaces == unit.spaces
    assert notes == {}


def test_a_router_left_out_is_noticed() -> None:
    """AutoAWQ's mixtures divide the norm and leave the router as it was."""
    unit = spacious(experts=4, inner=32)
    readers = named(unit, "post_attention_layernorm").readers
    assert f"{BLOCK}.mlp.gate" in readers
    proven, notes = prove(
        _with(unit, "post_attention_layernorm", readers=tuple(r for r in readers if r != f"{BLOCK}.mlp.gate"))
    )
    assert list(notes) == [f"{BLOCK}.post_attention_layernorm"]
    assert notes[f"{BLOCK}.post_attention_layernorm"].startswith("dropped: scaling it moves the block's output by")
    assert len(proven.spaces) == len(unit.spaces) - 1


def test_a_forgotten_reader_or_a_wrong_offset_is_noticed() -> None:
    unit = spacious()
    broken = _with(unit, "input_layernorm", readers=(f"{BLOCK}.self_attn.q_proj", f"{BLOCK}.self_attn.k_proj"))
    broken = _with(broken, "self_attn.v_proj", repeat=1, head=0, size=64)
    broken = replace(broken, spaces=tuple(s for s in broken.spaces if not s.name.endswith("v_proj")))
    assert list(prove(broken)[1]) == [f"{BLOCK}.input_layernorm"]
    writers = named(unit, "post_attention_layernorm").writers
    wrong = _with(unit, "post_attention_layernorm", writers=tuple(replace(w, offset=1.0) for w in writers))
    assert list(prove(wrong)[1]) == [f"{BLOCK}.post_attention_layernorm"]


def test_a_gate_is_not_an_inner_writer() -> None:
    """silu(x / s) is not silu(x) / s."""
    unit = spacious()
    writers = tuple(replace(w, tensor=f"{BLOCK}.mlp.gate_proj.weight") for w in named(unit, "mlp.up_proj").writers)
    assert list(prove(_with(unit, "mlp.up_proj", writers=writers))[1]) == [f"{BLOCK}.mlp.up_proj"]


@pytest.mark.parametrize("broken", [False, True])
def test_one_bad_expert_is_found_among_good_ones(broken: bool) -> None:
    unit = spacious(experts=4, inner=32)
    if broken:
        name = f"{BLOCK}.mlp.experts.2.gate_proj.weight"
        space = named(unit, "mlp.experts.2.up_proj")
        unit = _with(unit, "mlp.experts.2.up_proj", writers=(replace(space.writers[0], tensor=name),))
    assert list(prove(unit)[1]) == ([f"{BLOCK}.mlp.experts.2.up_proj"] if broken else [])


@pytest.mark.parametrize("sound", [True, False])
def test_large_values_in_the_residual_stream_hide_nothing(sound: bool) -> None:
    """Real models carry values in the thousands beside contributions of a hundredth."""
    unit = spacious()
    assert isinstance(unit.activations, ToyActivations)
    streams = {name: x.clone() for name, x in unit.activations.streams.items()}
    for x in streams.values():
        x[:, 0, 3] = 4000.0
    unit = replace(unit, activations=replace(unit.activations, streams=streams))
    if not sound:
        readers = named(unit, "post_attention_layernorm").readers
        unit = _with(unit, "post_attention_layernorm", readers=readers[:1])
    assert (prove(unit)[1] == {}) is sound


def test_what_nothing_rounded_reads_or_nothing_shows_is_said() -> None:
    unit = spacious()
    unit = replace(unit, layers=tuple(layer for layer in unit.layers if not layer.name.endswith("down_proj")))
    proven, notes = prove(unit)
    assert notes == {f"{BLOCK}.mlp.up_proj": "skipped: nothing that reads it is rounded"}
    silent = {**unit.weights, f"{BLOCK}.self_attn.o_proj.weight": torch.zeros(64, 64)}
    notes = prove(replace(proven, weights=silent))[1]
    assert all(
        "no effect on the block's output" in notes[f"{BLOCK}.{n}"] for n in ("input_layernorm", "self_attn.v_proj")
    )
