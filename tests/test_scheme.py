"""Schemes: presets as auto-round spells them, foreign spellings, and wishes that make no sense."""

from __future__ import annotations

import pytest

from roundel.errors import RecipeError
from roundel.recipe import Recipe
from roundel.scheme import ELEMENTS, MIXES, PRESETS, Grid, Scheme, integer_scheme


@pytest.mark.parametrize("name", ["W2A16", "W3A16", "W4A16", "W8A16", "W2A16G32", "W2A16G64"])
def test_integer_presets(name: str) -> None:
    scheme = Scheme.parse(name)
    assert scheme.bits == int(name[1])
    assert scheme.group_size == (int(name.partition("G")[2]) if "G" in name else 128)
    assert scheme.weight.symmetric
    assert scheme.input is None


def test_mx_presets_round_weights_by_floor_and_inputs_as_named() -> None:
    assert PRESETS["MXFP4_RCEIL"].weight == PRESETS["MXFP4"].weight
    assert PRESETS["MXFP4_RCEIL"].input.exponent == "rceil"  # type: ignore[union-attr]
    assert PRESETS["MXFP4_RCEIL"] != PRESETS["MXFP4"]


@pytest.mark.parametrize(
    ("text", "bits", "group", "sym"),
    [
        ("w4a16", 4, 128, True),
        ("W3A16G64_ASYM", 3, 64, False),
        ("W4A16G-1", 4, -1, True),
        ("W4A16_ASYM", 4, 128, False),
    ],
)
def test_spellings(text: str, bits: int, group: int, sym: bool) -> None:
    scheme = Scheme.parse(text)
    assert (scheme.bits, scheme.group_size, scheme.weight.symmetric) == (bits, group, sym)
    assert Scheme.parse(scheme.name) == scheme


@pytest.mark.parametrize("name", ["W1A16G64_HQQ", "W4A16_HQQ", "W8A16G-1_HQQ", "W3A16G32_HQQ"])
def test_float_zero_points_have_names_too(name: str) -> None:
    scheme = Scheme.parse(name)
    assert scheme.name == name and scheme.weight.has_float_zeros and not scheme.weight.is_integer
    assert scheme.altered(bits=2, group_size=64, sym=False) == Scheme.parse("W2A16G64_HQQ")
    groups = 1024 // (scheme.group_size if scheme.group_size > 0 else 1024)
    assert scheme.weight.bits_per_weight((16, 1024)) == scheme.bits + 32 * groups / 1024


def test_altered_replaces_only_what_is_named() -> None:
    assert Scheme.parse("W4A16").altered(bits=3) == Scheme.parse("W3A16")
    assert Scheme.parse("W4A16G64").altered(sym=False) == Scheme.parse("W4A16G64_ASYM")
    assert Scheme.parse("MXFP4").altered(bits=4) is PRESETS["MXFP4"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Scheme.parse("W4B16"), ["W4B16", "W4A16"]),
        (lambda: Scheme.parse("INT4"), ["INT4", "inputs", "W4A16"]),  # W4A4 to auto-round, so not quietly W4A16 here
        (lambda: Scheme.parse("W9A16"), ["9", "2 to 8"]),
        (lambda: Scheme.parse("W4A16_MIXED"), ["mix"]),
        (lambda: integer_scheme(4, 0), ["group_size=0", "-1"]),
        (lambda: integer_scheme(4, -2), ["group_size=-2"]),
        (lambda: Scheme.parse("MXFP4").altered(group_size=64), ["MXFP4", "fixed"]),
        (lambda: Scheme.parse("W7A16_HQQ"), ["bits=7", "1 to 6 or 8"]),
        (lambda: Scheme.parse("W1A16"), ["bits=1", "W1A16G64_HQQ"]),
        (lambda: Scheme.parse("W4A16_HQQ").altered(sym=True), ["W4A16_HQQ", "--sym"]),
        (lambda: Scheme.parse("W4A16G0_HQQ"), ["group_size=0"]),
        (lambda: Scheme.parse("INT8_W8A8").altered(bits=4), ["INT8_W8A8", "fixed"]),
        (lambda: Scheme.parse({"bitz": 4}), ["bitz", "bits"]),
        (lambda: Scheme.parse({"bits": "4"}), ["bits", "whole number"]),
        (lambda: Scheme.parse({"bits": True}), ["bits", "whole number"]),
        (lambda: Scheme.parse({"sym": 1}), ["sym", "true or false"]),
    ],
)
def test_refusals_name_the_value_and_the_allowed(make, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_blocks_and_bits() -> None:
    grid = Scheme.parse("W4A16").weight
    assert grid.blocks((10, 300)) == (10, 3)
    assert grid.bits_per_weight((128, 1024)) == 4 + 16 / 128
    assert Scheme.parse("W4A16_ASYM").weight.bits_per_weight((128, 1024)) == 4 + 20 / 128
    assert Grid(element=ELEMENTS["e4m3"], block=(128, 128), scale="F32").blocks((130, 256)) == (2, 2)
    nested = Grid(
        element=ELEMENTS["e2m1"], block=(1, 16), scale=Grid(element=ELEMENTS["e4m3"], block=(0, 0), scale="F32")
    )
    assert nested.bits_per_weight((64, 64)) == 4 + 8 / 16 + 32 / 4096


def test_presets_whose_inputs_are_rounded_say_whose_scales_are_stored() -> None:
    stored = {name for name, scheme in PRESETS.items() if scheme.stores_input_scale}
    assert stored == {"NVFP4", "FP8_STATIC", "FP8"}
    assert Scheme.parse("int8") == Scheme.parse("W8A8") == PRESETS["INT8_W8A8"]
    assert PRESETS["INT8_W8A8"].weight == Scheme.parse("W8A16G-1").weight
    assert PRESETS["NVFP4"].weight == PRESETS["NVFP4A16"].weight


def test_mixes_name_presets() -> None:
    for mix in MIXES.values():
        assert mix.experts in PRESETS
        assert mix.others in PRESETS


def test_options_from_a_command_line_are_those_given_from_python() -> None:
    texts, values = {"gptq.damping": "1", "awq.clip": "false"}, {"gptq.damping": 1.0, "awq.clip": False}
    typed = Recipe(algorithm="awq,gptq", options=texts)
    assert typed == Recipe(algorithm="awq,gptq", options=values) and typed.options == values
