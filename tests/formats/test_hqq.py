"""HQQ: the order of codes, zero points of any kind, layers that mean nothing or are not read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import roundel
from formats.test_formats import bytes_of, layer_of, rounded
from roundel.checkpoint import open_checkpoint
from roundel.errors import SourceError
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
