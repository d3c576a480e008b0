"""HQQ: the order of codes, zero points of any kind, layers that mean nothing or are not read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import roundel
from formats.test_formats import bytes_of, layer_of, rounded
from models.pico import build
from roundel.checkpoint import open_checkpoint
from roundel.errors import PlanError, SourceError
from roundel.formats import FORMATS, Contents, Format, Found, reader_of
from roundel.scheme import Scheme
from roundel.tensor import TensorSpec, torch_dtype
from roundel.unit import Layer, Stored
from roundel.verification import verify

HQQ = FORMATS["hqq"]
DTYPES = {torch_dtype(name): name for name in ("U8", "I32", "I64", "F16", "F32")}


def packed(scheme: str = "W4A16G32_ASYM", shape: tuple[int, int] = (8, 64)) -> tuple[Layer, dict[str, torch.Tensor]]:
    layer = layer_of(Scheme.parse(scheme), shape)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    return layer, HQQ.pack(layer, rounded(layer, weight))


def found_in(parts: dict[str, torch.Tensor], reader: Format) -> Found | None:
    specs = {name: TensorSpec(name, DTYPES[t.dtype], tuple(t.shape)) for name, t in parts.items()}
    return reader.find("a.b", reader.known("a.b", specs, lambda part: bytes_of(parts[part])))


def anyones() -> Format:
    reader = reader_of({"quantization_config": {"quant_method": "hqq", "quant_config": {}}})
    assert reader is not None
    return reader


def test_a_byte_holds_a_code_of_each_share() -> None:
    layer, parts = packed()
    codes = HQQ.unpack(layer, parts).codes.reshape(16, 32)
    assert torch.equal(parts["W_q"], codes[:8] << 4 | codes[8:])
    layer, parts = packed("W3A16G32_ASYM", (7, 96))
    codes = HQQ.unpack(layer, parts).codes.reshape(21, 32).int()
    expected = torch.zeros(3, 32, dtype=torch.int32)
    for group in range(21):
        expected[group % 3] |= codes[group] << (27 - 3 * (group // 3))
    assert torch.equal(parts["W_q"], expected)


def test_zero_points_that_are_no_whole_numbers_are_read() -> None:
    layer, parts = packed()
    parts["zero"] += 0.25
    found = found_in(parts, anyones())
    assert found is not None
    assert found.scheme.weight.zero == "float"
    layer = replace(layer, stored=Stored(format="hqq", scheme=found.scheme))
    read = HQQ.unpack(layer, parts)
    scale, zero = (parts[name].float() for name in ("scale", "zero"))
    expected = (read.codes.reshape(-1, 32).float() - zero) * scale
    assert torch.equal(read.decode(), expected.view(8, 64))


@pytest.mark.parametrize("scheme", ["W4A16G32", "W4A16G32_ASYM"])
def test_zero_points_that_the_config_denies_are_told(scheme: str) -> None:
    layer, parts = packed(scheme)
    parts["zero"][3] += 0.5
    with pytest.raises(SourceError, match="zero point"):
        HQQ.unpack(layer, parts)


def test_the_config_tells_which_layers_are_symmetric() -> None:
    schemes = {"a.q": "W4A16G32", "a.k": "W4A16G32_ASYM", "a.v": "W8A16G64"}
    layers = [replace(layer_of(Scheme.parse(s), (8, 64)), name=n) for n, s in schemes.items()]
    reader = reader_of({"quantization_config": HQQ.config(Contents(layers=layers, kept=[], default=layers[0].scheme))})
    assert reader is not None
    for layer in layers:
        parts = HQQ.pack(layer, rounded(layer, torch.ones(8, 64)))
        specs = {name: TensorSpec(name, DTYPES[t.dtype], tuple(t.shape)) for name, t in parts.items()}
        known = reader.known(layer.name, specs, lambda part, parts=parts: bytes_of(parts[part]))  # type: ignore[misc]
        found = reader.find(layer.name, known)
        assert found is not None
        assert found.scheme == layer.scheme


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("axis", torch.tensor(0, dtype=torch.int32), "axis 0"),
        ("quant_zero", torch.tensor(1, dtype=torch.uint8), "quantized"),
        ("nbits", torch.tensor(7, dtype=torch.int32), "nbits"),
        ("nbits", torch.tensor(1.58), "nbits"),
        ("shape", torch.tensor([8, -64]), "shape"),
        ("shape", torch.tensor([8, 64, 1]), "shape"),
        ("shape", torch.tensor([16, 64]), "W_q"),
        ("shape", torch.arange(1000), "shape"),
        ("group_size", torch.tensor(0, dtype=torch.int32), "group_size"),
        ("group_size", torch.tensor(24, dtype=torch.int32), "group_size"),
        ("scale", torch.ones(3, 1), "W_q"),
    ],
)
def test_layers_that_mean_nothing_are_told(name: str, value: torch.Tensor, why: str) -> None:
    _, parts = packed()
    with pytest.raises(SourceError, match=why):
        found_in(parts | {name: value}, anyones())


@pytest.mark.parametrize("lost", ["scale", "zero", "shape", "nbits", "axis"])
def test_lost_parts_are_told(lost: str) -> None:
    _, parts = packed()
    del parts[lost]
    with pytest.raises(SourceError, match=f"no {lost}"):
        found_in(parts, anyones())


def test_zero_points_of_their_own_solver_go_along(tmp_path: Path) -> None:
    """1 to 8 bits, as hqq wrote them."""
    theirs = Path(__file__).parents[1] / "data" / "golden" / "hqq"
    roundel.convert(theirs, tmp_path / "out", format="hqq")
    before, after = load_file(theirs / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    packed = [name for name in before if name.endswith((".W_q", ".scale", ".zero"))]
    assert len(packed) == 21 and all(torch.equal(before[name], after[name]) for name in packed)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert all(layer.scheme.weight.zero == "float" for layer in checkpoint.layers.values())
    checkpoint.close()
    assert verify(tmp_path / "out", theirs).passed


@pytest.mark.parametrize("algorithm", ["rtn", "hqq"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_float_zero_points_are_rounded_to_and_written(bits: int, algorithm: str, tmp_path: Path) -> None:
    model, out = build("llama", tmp_path / "model"), tmp_path / "out"
    report = roundel.quantize(model, out, scheme=f"W{bits}A16G32_HQQ", algorithm=algorithm, format="hqq,fake")
    assert verify(out / "hqq", model).passed
    told = json.loads((out / "hqq" / "config.json").read_text())["quantization_config"]["quant_config"]
    assert told["weight_quant_params"]["round_zero"] is False
    checkpoint, fake = open_checkpoint(out / "hqq"), open_checkpoint(out / "fake")
    for name, layer in checkpoint.layers.items():
        found = checkpoint.unpack(layer)
        assert layer.scheme.name == f"W{bits}A16G32_HQQ" and layer.scheme.weight.has_float_zeros
        assert found.zero is not None and not torch.equal(found.zero, found.zero.round())
        assert torch.equal(found.decode().bfloat16(), fake.tensor(f"{name}.weight"))
    checkpoint.close()
    fake.close()
    if algorithm == "hqq":
        whole = 1.0 if bits == 1 else roundel.quantize(
            model, tmp_path / "whole", scheme=f"W{bits}A16G32_ASYM", algorithm="hqq", format="fake"
        ).mean_sqnr  # fmt: skip
        assert report.mean_sqnr > whole


def test_float_zero_points_are_refused_by_name_elsewhere(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model")
    for format, algorithm in (("auto_round", "hqq"), ("mlx", "hqq"), ("hqq", "gptq"), ("hqq", "opt-rtn")):
        with pytest.raises(PlanError, match="W4A16G32_HQQ"):
            roundel.plan(model, scheme="W4A16G32_HQQ", algorithm=algorithm, format=format)
    with pytest.raises(PlanError, match="hqq stores 2, 3, 4, 5, 6 or 8 bits, W7A16"):
        roundel.plan(model, scheme="W7A16", format="hqq")
