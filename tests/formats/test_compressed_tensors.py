"""compressed-tensors as other tools write it: groups by pattern, group indices, several layouts, damaged tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import roundel
from roundel.data.bundled import bundled_model
from roundel.errors import SourceError
from roundel.formats import FORMATS, Contents, Format, reader_of
from roundel.formats.compressed_config import group_for, group_of, scheme_of
from roundel.ops.encode import encode_reference
from roundel.scheme import PRESETS, Scheme
from roundel.support import nominal_layer, shown_schemes
from roundel.tensor import TensorSpec
from roundel.unit import Layer, Stored


def layer_of(scheme: Scheme, shape: tuple[int, int] = (24, 128)) -> Layer:
    return Layer(name="a.b", shape=shape, dtype="BF16", scheme=scheme, stored=Stored())


STORED = [
    name
    for name, scheme in shown_schemes().items()
    if "RCEIL" not in name and FORMATS["llm_compressor"].refuse(nominal_layer(scheme)) is None
]


def reader(**groups: dict[str, Any]) -> Format:
    config = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    found = reader_of({"quantization_config": config})
    assert found is not None
    return found


def specs(layer: Layer) -> dict[str, TensorSpec]:
    return {s.name: s for s in FORMATS["llm_compressor"].outputs(layer)}


@pytest.mark.parametrize("name", STORED)
def test_a_group_says_its_scheme(name: str) -> None:
    scheme = shown_schemes()[name]
    found = scheme_of(group_of(scheme, ["Linear"]))
    assert found == scheme
    assert found.name == scheme.name


@pytest.mark.parametrize(
    "weights",
    [
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": "many"},
        {"num_bits": 12, "type": "int", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [0, 128]},
        {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": False},
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 64},
        {"num_bits": None, "strategy": ["group"]},
        "W4A16",
    ],
)
def test_arguments_that_are_no_grid(weights: object) -> None:
    assert scheme_of({"weights": weights}) is None


def test_names_come_before_patterns_and_patterns_before_classes() -> None:
    groups = {
        "all": {"targets": ["Linear"]},
        "pattern": {"targets": ["re:.*down_proj$", "re:("]},
        "named": {"targets": ["model.layers.1.mlp.down_proj"]},
    }
    assert group_for("model.layers.0.mlp.up_proj", groups) is groups["all"]
    assert group_for("model.layers.0.mlp.down_proj", groups) is groups["pattern"]
    assert group_for("model.layers.1.mlp.down_proj", groups) is groups["named"]
    assert group_for("x", {"all": {"targets": None}, "more": {"targets": 3}}) is None


def test_a_stored_order_of_columns_is_read() -> None:
    """llm-compressor's act-order: column c belongs to group weight_g_idx[c]."""
    scheme = PRESETS["W4A16G32"]
    layer, format = layer_of(scheme), reader(g=group_of(scheme, ["Linear"]))
    index = torch.arange(128, dtype=torch.int32)[torch.randperm(128)] // 32
    quantized = encode_reference(torch.randn(24, 128), scheme.weight)
    parts = FORMATS["llm_compressor"].pack(layer, quantized) | {"weight_g_idx": index}
    found = format.find("a.b", specs(layer) | {"weight_g_idx": TensorSpec("weight_g_idx", "I32", (128,))})
    assert found is not None
    assert found.parts[-1] == "weight_g_idx"
    assert torch.equal(format.unpack(layer, parts).decode(), replace(quantized, group_index=index).decode())
    with pytest.raises(SourceError, match="names groups"):
        format.unpack(layer, parts | {"weight_g_idx": index + 1})


@pytest.mark.parametrize("name", ["INT8_W8A8", "W4A16", "W3A16_ASYM"])
@pytest.mark.parametrize("change", ["lost", "dtype", "shape"])
def test_tensors_that_do_not_fit_are_told(name: str, change: str) -> None:
    layer = layer_of(shown_schemes()[name])
    format, right = reader(g=group_of(layer.scheme, ["Linear"])), specs(layer)
    assert format.find("a.b", right) is not None
    for part, spec in right.items():
        if part == "weight" or (part == "weight_packed" and change != "shape"):
            continue  # without it, or as something else, it is another layer or none
        wrong = {
            "dtype": replace(spec, dtype="U8"),
            "shape": replace(spec, shape=(*spec.shape[:-1], spec.shape[-1] + 1)),
        }.get(change)
        with pytest.raises(SourceError, match=r"a\.b"):
            format.find("a.b", {n: s for n, s in right.items() if n != part} | ({part: wrong} if wrong else {}))


def test_a_width_the_words_do_not_hold_is_told() -> None:
    """weight_shape is read with the weights: a file that lies there is refused, not trusted."""
    layer, format = layer_of(PRESETS["W4A16"]), reader(g=group_of(PRESETS["W4A16"], ["Linear"]))
    parts = FORMATS["llm_compressor"].pack(layer, encode_reference(torch.randn(24, 128), layer.scheme.weight))
    with pytest.raises(SourceError, match="weight_shape says"):
        format.unpack(layer, parts | {"weight_shape": torch.tensor([24, 1 << 40])})


def test_codes_beyond_their_width_are_told() -> None:
    group = group_of(PRESETS["INT8_W8A8"], ["Linear"])
    group["weights"] = {**group["weights"], "num_bits": 4}  # type: ignore[dict-item]
    layer = layer_of(PRESETS["INT8_W8A8"])
    format = reader(g=group)
    found = format.find("a.b", specs(layer))
    assert found is not None
    parts = FORMATS["llm_compressor"].pack(layer, encode_reference(torch.randn(24, 128), layer.scheme.weight))
    with pytest.raises(SourceError, match="codes reach"):
        format.unpack(replace(layer, scheme=found.scheme), parts)


def test_integers_without_a_group_are_refused() -> None:
    with pytest.raises(SourceError, match="no group of integers"):
        reader(g=group_of(PRESETS["MXFP4"], ["other"])).find("a.b", specs(layer_of(PRESETS["W4A16"])))


def test_layers_on_several_layouts_are_one_mixed_file() -> None:
    names = ("W4A16", "FP8_DYNAMIC", "NVFP4A16", "MXFP8")
    layers = [replace(layer_of(PRESETS[n]), name=f"model.layers.{i}.q") for i, n in enumerate(names)]
    config: Any = FORMATS["llm_compressor"].config(Contents(layers=layers, kept=[], default=PRESETS["W4A16"]))
    assert config["format"] == "mixed-precision"
    format = reader_of({"quantization_config": config})
    assert format is not None
    for layer in layers:
        found = format.find(layer.name, specs(layer))
        assert found is not None
        assert found.scheme == layer.scheme


def test_rceil_has_no_word_in_the_config() -> None:
    for scheme, told in (("MXFP4_RCEIL", 1), ("MXFP8", 0)):
        plan = roundel.plan(bundled_model(), scheme=scheme, format="llm_compressor")
        assert sum("no word for RCEIL" in note for note in plan.notes) == told
