"""The pico checkpoints are what they say: transformers loads each one, packed weights decode to what was packed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models import packed
from models.layout import Config
from models.pico import PICO_TYPES, build, build_fp8, build_mxfp4, build_nvfp4, shapes_of, weight_of
from models.table import PICO


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", PICO_TYPES)
def test_transformers_finds_every_tensor(model_type: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    overrides: Config = {"quantization_config": None} if model_type == "gpt_oss" else {}
    folder = build(model_type, tmp_path, **overrides)
    _, info = getattr(transformers, PICO[model_type].architecture).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(name.startswith(("model.layers.2.", "mtp.")) for name in info["unexpected_keys"])


@pytest.mark.parametrize("model_type", PICO_TYPES)
def test_small_and_the_same_every_time(model_type: str, tmp_path: Path) -> None:
    first, again = (build(model_type, tmp_path / name) / "model.safetensors" for name in ("first", "again"))
    assert first.stat().st_size < 1_000_000
    assert first.read_bytes() == again.read_bytes()


def test_shards_and_dtypes_hold_the_same_numbers(tmp_path: Path) -> None:
    whole = load_file(build("qwen3_moe", tmp_path / "whole", dtype="float32") / "model.safetensors")
    folder = build("qwen3_moe", tmp_path / "shards", shards=3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {name: load_file(folder / name) for name in set(index["weight_map"].values())}
    assert len(files) == 3
    assert set(index["weight_map"]) == set(whole)
    for name, file in index["weight_map"].items():
        assert torch.equal(files[file][name], whole[name].to(torch.bfloat16))
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files.values() for t in file.values())
    other = load_file(build("qwen3_moe", tmp_path / "seed", seed=1) / "model.safetensors")
    assert not torch.equal(other["lm_head.weight"], whole["lm_head.weight"].to(torch.bfloat16))


def spread(scale: Tensor, block: int, shape: torch.Size) -> Tensor:
    rows = scale.float().repeat_interleave(block, 0)[: shape[0]]
    return rows.repeat_interleave(block, 1)[:, : shape[1]]


def e2m1(codes: Tensor) -> Tensor:
    """Bytes [out, in / 2] -> values [out, in], the low four bits first."""
    both = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()
    return packed.E2M1[both & 7] * (1 - 2 * (both >> 3))


def decode_fp8(parts: dict[str, Tensor]) -> Tensor:
    codes = parts["weight"].float()
    if "weight_scale_inv" in parts:
        return codes * spread(parts["weight_scale_inv"], 128, codes.shape)
    return codes * parts["weight_scale"].float()


def decode_mxfp4(parts: dict[str, Tensor]) -> Tensor:
    return e2m1(parts["weight_packed"]) * torch.exp2(parts["weight_scale"].float() - 127).repeat_interleave(32, 1)


def decode_nvfp4(parts: dict[str, Tensor]) -> Tensor:
    scale = parts["weight_scale"].float().repeat_interleave(16, 1)
    if "weight_scale_2" in parts:
        return e2m1(parts["weight"]) * scale * parts["weight_scale_2"]
    return e2m1(parts["weight_packed"]) * scale / parts["weight_global_scale"]


@pytest.mark.parametrize(
    ("write", "decode", "error"),
    [
        (lambda path: build_fp8(path, "block", hidden_size=192), decode_fp8, 0.04),
        (lambda path: build_fp8(path, "channel"), decode_fp8, 0.04),
        (lambda path: build_fp8(path, "tensor"), decode_fp8, 0.04),
        (build_mxfp4, decode_mxfp4, 0.15),
        (build_nvfp4, decode_nvfp4, 0.12),
        (lambda path: build_nvfp4(path, "modelopt"), decode_nvfp4, 0.12),
    ],
    ids=["fp8 block", "fp8 channel", "fp8 tensor", "mxfp4", "nvfp4", "nvfp4 modelopt"],
)
def test_packed_weights_decode(
    write: Callable[[Path], Path], decode: Callable[[dict[str, Tensor]], Tensor], error: float, tmp_path: Path
) -> None:
    folder = write(tmp_path)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] in ("fp8", "compressed-tensors", "modelopt")
    hidden = config["hidden_size"]
    for name, shape in shapes_of("llama", hidden_size=hidden).items():
        weight = weight_of(name, shape).to(torch.bfloat16)
        if "_proj." not in name:
            assert torch.equal(tensors[name], weight)
            continue
        layer = name.removesuffix("weight")
        found = decode({key.removeprefix(layer): tensor for key, tensor in tensors.items() if key.startswith(layer)})
        assert float((found - weight.float()).norm() / weight.float().norm()) < error


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_the_blocks_of_gpt_oss_as_they_were_packed(tmp_path: Path) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    tensors = load_file(build("gpt_oss", tmp_path) / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weight = weight_of(name, shapes_of("gpt_oss")[name])  # [experts, in, out]
    found = mxfp4.convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32)
    assert found.shape == weight.shape
    assert float((found - weight).norm() / weight.norm()) < 0.15
