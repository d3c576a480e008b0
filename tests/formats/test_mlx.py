"""MLX: biases and zero points, what its config tells, experts in one tensor, what is refused or damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import roundel
from formats.test_formats import layer_of
from models.pico import build
from roundel.algorithms import Rtn
from roundel.checkpoint import open_checkpoint
from roundel.errors import NumericsError, PlanError, SourceError
from roundel.formats import FORMATS, Contents, reader_of
from roundel.formats.mlx import MXFP4, MXFP8, NVFP4, flat_rope
from roundel.scheme import ELEMENTS, Scheme
from roundel.tensor import QuantizedTensor, TensorSpec
from roundel.unit import Layer, Stored, Unit

MLX = FORMATS["mlx"]


def rounded(layer: Layer, weight: torch.Tensor) -> QuantizedTensor:
    unit = Unit(name=layer.name, layers=(layer,), weights={layer.tensor: weight})
    return Rtn().quantize(unit)[layer.name].tensor


def matrix(*shape: int, scale: float = 0.02) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)) * scale


def stored_as(layer: Layer, scheme: Scheme) -> Layer:
    return replace(layer, stored=Stored(format="mlx", scheme=scheme))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_readers_compute_scale_times_code_plus_bias(bits: int) -> None:
    layer = layer_of(Scheme.parse(f"W{bits}A16G32_ASYM"), (40, 96))
    quantized = rounded(layer, matrix(40, 96))
    parts = MLX.pack(layer, quantized)
    spread = {name: parts[name].float().repeat_interleave(32, 1) for name in ("scales", "biases")}
    assert torch.equal(MLX.decode(quantized), quantized.codes.float() * spread["scales"] + spread["biases"])
    step = quantized.scale.float().repeat_interleave(32, 1)  # type: ignore[union-attr]
    assert ((MLX.decode(quantized) - quantized.decode()).abs() <= step * 2**bits / 2048).all()


def test_a_symmetric_grid_loses_nothing() -> None:
    for bits in (2, 3, 4, 5, 6, 8):
        layer = layer_of(Scheme.parse(f"W{bits}A16G32"), (16, 96))
        quantized = rounded(layer, matrix(16, 96))
        foreign = reader_of({"quantization": {"group_size": 32, "bits": bits}})
        assert foreign is not None
        found = foreign.find("a.b", {s.name: s for s in MLX.outputs(layer)})
        assert found is not None
        assert found.scheme.weight.offset is not None
        read = MLX.unpack(stored_as(layer, found.scheme), MLX.pack(layer, quantized))
        assert read.offset is not None
        assert torch.equal(read.decode(), quantized.decode())


def test_any_biases_are_read_and_written_as_they_are() -> None:
    reader = reader_of({"quantization": {"group_size": 64, "bits": 4}})
    assert reader is not None
    parts = {"weight": torch.randint(0, 2**31, (8, 8)).to(torch.int32).view(torch.uint32)}
    parts |= {name: matrix(8, 1).bfloat16() for name in ("scales", "biases")}
    specs = {"weight": TensorSpec("", "U32", (8, 8))} | {
        n: TensorSpec("", "BF16", (8, 1)) for n in ("scales", "biases")
    }
    found = reader.find("a.b", specs)
    assert found is not None
    layer = stored_as(layer_of(found.scheme, found.shape), found.scheme)
    quantized = reader.unpack(layer, parts)
    assert quantized.decode().shape == (8, 64)
    again = MLX.pack(layer, quantized)
    assert all(torch.equal(again[name].view(torch.uint8), parts[name].view(torch.uint8)) for name in parts)


def test_a_bias_that_belongs_to_no_zero_point_is_told() -> None:
    for scheme in ("W4A16G32", "W4A16G32_ASYM"):
        layer = layer_of(Scheme.parse(scheme), (8, 64))
        parts = MLX.pack(layer, rounded(layer, matrix(8, 64)))
        parts["biases"][3, 1] *= 1.1
        with pytest.raises(SourceError, match="zero point"):
            MLX.unpack(layer, parts)


def test_a_bias_beyond_float16_is_not_written() -> None:
    layer = layer_of(Scheme.parse("W8A16G32_ASYM"), (1, 32))
    with pytest.raises(NumericsError, match="beyond"):
        MLX.pack(layer, rounded(layer, matrix(1, 32, scale=1e5)))


@pytest.mark.parametrize("scheme", [MXFP4, MXFP8], ids=lambda scheme: scheme.name)
def test_small_floats_and_back(scheme: Scheme) -> None:
    layer = layer_of(scheme, (24, 96))
    assert MLX.refuse(layer) is None
    quantized = rounded(layer, matrix(24, 96))
    parts = MLX.pack(layer, quantized)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in parts.items()} == {
        "weight": (torch.uint32, (24, 96 * scheme.bits // 32)),
        "scales": (torch.uint8, (24, 3)),
    }
    assert torch.equal(MLX.unpack(layer, parts).decode(), quantized.decode())


def test_nvfp4_and_back() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (8, 64), generator=generator, dtype=torch.uint8)
    scale = torch.rand(8, 4, generator=generator).to(torch.float8_e4m3fn)
    layer = layer_of(NVFP4, (8, 64))
    parts = MLX.pack(layer, QuantizedTensor(grid=NVFP4.weight, codes=codes, scale=scale))
    back = MLX.unpack(layer, parts)
    assert torch.equal(back.codes, codes)
    assert torch.equal(back.scale.view(torch.uint8), scale.view(torch.uint8))  # type: ignore[union-attr]
    reader = reader_of({"quantization": {"group_size": 16, "bits": 4, "mode": "nvfp4"}})
    found = reader.find("a.b", {s.name: s for s in MLX.outputs(layer)})  # type: ignore[union-attr]
    assert found is not None
    assert (found.scheme, found.shape) == (NVFP4, (8, 64))


def test_nvfp4_is_rounded_without_a_float_for_the_matrix() -> None:
    scheme = MLX.grid_of(Scheme.parse("NVFP4A16"))
    assert scheme == NVFP4
    weight = matrix(8, 64, scale=1.0)
    weight[2, 16:32] = 0
    weight[3, :16] = 1e-4  # below the least scale
    quantized = rounded(layer_of(scheme, (8, 64)), weight)
    groups = weight.view(8, 4, 16)
    scale = (groups.abs().amax(-1) / 6).to(torch.float8_e4m3fn)
    assert torch.equal(quantized.scale.view(torch.uint8), scale.view(torch.uint8))  # type: ignore[union-attr]
    levels = torch.tensor(sorted({*ELEMENTS["e2m1"].values}))  # type: ignore[misc]
    nearest = levels[(groups[..., None] / scale.float()[..., None, None] - levels).abs().argmin(-1)]
    expected = torch.where(scale.float()[..., None] == 0, 0.0, nearest * scale.float()[..., None])
    assert torch.equal(quantized.decode(), expected.view(8, 64))


@pytest.mark.parametrize(
    ("scheme", "shape", "why"),
    [
        ("W7A16", (64, 128), "asks for 7"),
        ("W4A16G96", (64, 96), "groups of 32, 64 or 128"),
        ("W4A16G-1", (64, 128), "asks for -1"),  # the config has no word for rows of several lengths
        ("W4A16G64", (64, 96), "not divisible by 64"),
        ("MXFP4", (64, 128), "leaves inputs as they are"),
    ],
)
def test_what_is_refused(scheme: str, shape: tuple[int, int], why: str) -> None:
    assert why in str(MLX.refuse(layer_of(Scheme.parse(scheme), shape)))


@pytest.mark.parametrize("name", ["mlx", "auto_round:mlx"])
def test_config_names_exceptions_and_symmetry(name: str) -> None:
    format = FORMATS[name]
    schemes = {"a.q": "W4A16G64", "a.k": "W8A16G64_ASYM", "a.v": "W4A16G64_ASYM", "a.o": "W4A16G64"}
    layers = [replace(layer_of(Scheme.parse(s), (8, 64)), name=n) for n, s in schemes.items()]
    contents = Contents(layers=layers, kept=["lm_head"], default=layers[0].scheme)
    settings = format.settings({"model_type": "llama"}, format.config(contents))
    quantization: Any = settings["quantization"]
    assert (quantization["bits"], quantization["group_size"]) == (4, 64)
    assert quantization["a.k"]["bits"] == 8
    reader = reader_of(settings)
    assert reader is not None
    assert reader.name == name
    for layer in layers:
        found = reader.find(layer.name, {s.name: s for s in format.outputs(layer)})
        assert found is not None
        assert found.scheme == layer.scheme, layer.name


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"weight": ("U32", (8, 8))}, "no scales"),
        ({"weight": ("U32", (8, 8)), "scales": ("F16", (8, 1))}, "biases are missing"),
        ({"weight": ("U32", (8, 8)), "scales": ("F16", (8, 1)), "biases": ("F32", (8, 1))}, "biases are missing"),
        ({"weight": ("U32", (8, 8)), "scales": ("F16", (8, 5)), "biases": ("F16", (8, 5))}, "do not fit"),
        ({"weight": ("U32", (8, 8)), "scales": ("U8", (8, 1))}, "no small floats"),
    ],
)
def test_broken_layers_are_told(parts: dict[str, tuple[str, tuple[int, ...]]], why: str) -> None:
    reader = reader_of({"quantization": {"group_size": 64, "bits": 4}})
    assert reader is not None
    with pytest.raises(SourceError, match=why):
        reader.find("a.b", {n: TensorSpec(n, *spec) for n, spec in parts.items()})


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_experts_lie_in_one_tensor(kind: str, tmp_path: Path) -> None:
    source = build(kind, tmp_path / "source")
    out = tmp_path / "out"
    roundel.quantize(source, out, scheme="W4A16G32", format="mlx")
    roundel.quantize(source, tmp_path / "apart", scheme="W4A16G32", format="auto_round")
    held = load_file(out / "model.safetensors")
    stacks = [name for name in held if ".switch_mlp." in name]
    assert len(stacks) == 2 * 3 * 3
    assert all(held[name].shape[0] == 4 for name in stacks)
    assert not [name for name in held if ".experts." in name]
    ours, others = open_checkpoint(out), open_checkpoint(tmp_path / "apart")
    assert set(ours.layers) == set(others.layers)
    for name in ours.layers:
        assert torch.equal(ours.decode(name), others.decode(name)), name
    ours.close()
    others.close()
    assert roundel.quantize(source, tmp_path / "parts", scheme="W4A16G32", format="mlx", shard_size=20_000)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    again = {k: v for path in (tmp_path / "parts").glob("*.safetensors") for k, v in load_file(path).items()}
    assert all(torch.equal(again[k].view(torch.uint8), held[k].view(torch.uint8)) for k in held)


def test_experts_of_one_tensor_are_alike(tmp_path: Path) -> None:
    source = build("qwen3_moe", tmp_path / "source")
    for option in (
        {"ignore_layers": ["layers.0.mlp.experts.3.up_proj"]},
        {"layer_config": {"layers.0.mlp.experts.2.up_proj": {"bits": 8}}},
    ):
        with pytest.raises(PlanError, match="4 experts"):
            roundel.quantize(source, tmp_path / "out", scheme="W4A16G32", format="mlx", **option)  # type: ignore[arg-type]


def test_rope_is_found_where_readers_look(tmp_path: Path) -> None:
    nested = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    assert flat_rope({"rope_parameters": nested}) == {
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    }
    assert flat_rope({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}) == {"rope_theta": 1e6}
    assert flat_rope({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e6}) == {}
    source = build("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config.pop("rope_theta", None)
    (source / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_theta": 12345.0}}))
    roundel.quantize(source, tmp_path / "out", scheme="W4A16G32", format="mlx")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == 12345.0
    assert written["quantization"] == written["quantization_config"]


def test_experts_of_gpt_oss_keep_their_numbers_and_biases(tmp_path: Path) -> None:
    """mlx-lm holds them under `experts`, biases in one tensor as well; MXFP4 moves over as it is."""
    source = build("gpt_oss", tmp_path / "model")
    roundel.quantize(source, tmp_path / "out", scheme="MXFP4A16", format="mlx", ignore_layers=["self_attn"])
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    up = "model.layers.0.mlp.experts.up_proj"
    assert tensors[f"{up}.weight"].dim() == 3
    assert tensors[f"{up}.bias"].shape == tensors[f"{up}.scales"].shape[:2]
    assert not any("switch_mlp" in name or ".experts.0." in name for name in tensors)
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert set(after.layers) == {name for name in before.layers if ".experts." in name}
    for name, layer in after.layers.items():
        assert torch.equal(after.decode(name), before.decode(name))
        one, other = (c.read_piece(c.matrices[name].bias[1]) for c in (before, after))  # type: ignore[index]
        assert layer.bias is not None
        assert torch.equal(one, other)
    before.close()
    after.close()
