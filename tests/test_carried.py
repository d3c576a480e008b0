"""What a checkpoint carries beside its weights goes along into other formats, or is said to be lost, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import roundel
from commands import command
from formats.test_gguf import tokenized
from models.pico import build
from roundel.calibration.tokenizer import load_tokenizer
from roundel.checkpoint import open_checkpoint
from roundel.data.bundled import bundled_model
from roundel.errors import PlanError, SourceError
from roundel.verification import verify

KEYS = "model.layers.0.self_attn.k_scale"
IDS = [[(7 * i + k) % 50 for i in range(16)] for k in range(2)]
SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
CACHED: dict[str, Any] = {
    "scheme": "FP8_DYNAMIC", "format": "llm_compressor", "kv_cache": "fp8", "seqlen": 16, "nsamples": 2, "dataset": IDS,
}  # fmt: skip


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    roundel.quantize(tokenized(build("llama", folder / "model", **SIZES)), folder / "out", **CACHED)
    return folder / "out"


def changed(cached: Path, folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the checkpoint with another quantization_config and other tensors."""
    folder.mkdir()
    config, tensors = json.loads((cached / "config.json").read_text()), load_file(cached / "model.safetensors")
    change(config["quantization_config"], tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_scales_of_the_cache_go_along(cached: Path, tmp_path: Path) -> None:
    before = load_file(cached / "model.safetensors")
    report = roundel.convert(cached, tmp_path / "out", format="llm_compressor")
    after, config = (
        load_file(tmp_path / "out" / "model.safetensors"),
        json.loads((tmp_path / "out/config.json").read_text()),
    )
    assert {name: float(tensor) for name, tensor in after.items() if name.endswith(("k_scale", "v_scale"))} == {
        f"model.layers.{n}.self_attn.{part}": float(before[f"model.layers.{n}.self_attn.{part}"])
        for n in (0, 1) for part in ("k_scale", "v_scale")
    }  # fmt: skip
    assert config["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
    assert "keys and values in the cache: fp8" in command("inspect", tmp_path / "out").output
    assert not any("left out" in note for note in report.plan.notes)
    roundel.quantize(cached, tmp_path / "anew", scheme="W4A16G32", format="llm_compressor")
    again = json.loads((tmp_path / "anew/config.json").read_text())["quantization_config"]
    assert again["kv_cache_scheme"] == config["quantization_config"]["kv_cache_scheme"]


@pytest.mark.parametrize("to", ["auto_round", "gguf:q8_0", "mlx", "fake"])
def test_scales_of_the_cache_that_have_no_place(to: str, cached: Path, tmp_path: Path) -> None:
    report = roundel.convert(cached, tmp_path / "out", format=to, requantize=True)
    (note,) = (note for note in report.plan.notes if "scales of keys and values are left out" in note)
    assert f"(4 tensors, such as {KEYS})" in note and f"for which {to} has no place" in note
    checkpoint = open_checkpoint(tmp_path / "out")
    assert not any("k_scale" in name for name in checkpoint.source.tensors)
    checkpoint.close()
    found = verify(tmp_path / "out", cached)
    assert found.passed, found.problems


def other_kind(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["kv_cache_scheme"] |= {"strategy": "attn_head"}
    for name in [name for name in tensors if name.endswith(("k_scale", "v_scale"))]:
        tensors[name] = tensors[name].repeat(4)


def queries(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_scale"] = torch.ones(1)


def half(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del tensors[KEYS]


@pytest.mark.parametrize(
    ("change", "said"), [(other_kind, "float8 by attn_head"), (queries, "5 tensors"), (half, "3 tensors")]
)
def test_scales_of_other_kinds(change: Any, said: str, cached: Path, tmp_path: Path) -> None:
    report = roundel.convert(changed(cached, tmp_path / "in", change), tmp_path / "out", format="llm_compressor")
    (note,) = (note for note in report.plan.notes if "left out" in note)
    assert said in note
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] is None
    assert not any(
        "scale" in name and "self_attn.k_scale" in name for name in load_file(tmp_path / "out/model.safetensors")
    )


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("transform_config", {"config_groups": {"R3": {"type": "hadamard"}}}, "transforms of activations"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparse weights"),
    ],
)
def test_what_changes_the_function_is_refused(key: str, value: object, said: str, cached: Path, tmp_path: Path) -> None:
    folder = changed(cached, tmp_path / "in", lambda config, _: config.update({key: value}))
    with pytest.raises(SourceError, match=said):
        open_checkpoint(folder)
    open_checkpoint(changed(cached, tmp_path / "none", lambda config, _: config.update({key: {}}))).close()


@pytest.mark.parametrize("key", ["rotation_config", "spinquant_config"])
def test_rotations_of_auto_round_are_refused(key: str, tmp_path: Path) -> None:
    roundel.quantize(build("llama", tmp_path / "model"), tmp_path / "packed", scheme="W4A16G32")
    folder = changed(tmp_path / "packed", tmp_path / "in", lambda config, _: config.update({key: {"block_size": 32}}))
    with pytest.raises(SourceError, match=f"rotations of activations .{key}"):
        open_checkpoint(folder)


def test_scales_of_inputs(tmp_path: Path) -> None:
    """Static ones move where they have a place; where they have none, the plan says which schemes meet."""
    model = build("llama", tmp_path / "model", **SIZES)
    static: dict[str, Any] = {"scheme": "FP8_STATIC", "seqlen": 16, "nsamples": 2, "dataset": IDS}
    roundel.quantize(model, tmp_path / "static", format="llm_compressor", **static)
    before = load_file(tmp_path / "static" / "model.safetensors")
    roundel.convert(tmp_path / "static", tmp_path / "moved", format="auto_round")
    after = load_file(tmp_path / "moved" / "model.safetensors")
    scales = {name: float(tensor) for name, tensor in before.items() if name.endswith("input_scale")}
    assert len(scales) == 14 and scales == {name: float(after[name]) for name in scales}
    with pytest.raises(PlanError):
        roundel.convert(tmp_path / "static", tmp_path / "fp8", format="fp8")
    notes = roundel.convert(tmp_path / "static", tmp_path / "fp8", format="fp8", requantize=True).plan.notes
    assert any("inputs of 14 layers are treated otherwise, FP8_STATIC to FP8_BLOCK" in note for note in notes)


@pytest.mark.parametrize("to", ["auto_gptq", "auto_awq", "gptq_v2", "llm_compressor", "mlx", "hqq", "gguf", "fake"])
def test_everything_else(to: str, tmp_path: Path) -> None:
    """Biases, a rounded head, and every small file but those that speak of the source's format."""
    model = tokenized(build("qwen2", tmp_path / "model", **SIZES))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "generation_config.json").write_text('{"temperature": 0.5}')
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    tensors = load_file(model / "model.safetensors")
    biases = [name for name in tensors if name.endswith(".bias")]
    generator = torch.Generator().manual_seed(0)
    tensors |= {name: torch.randn(tensors[name].shape, generator=generator).to(tensors[name]) for name in biases}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    packed, out = tmp_path / "packed", tmp_path / "out"
    roundel.quantize(model, packed, scheme="W4A16G32", format="auto_round", quant_lm_head=True)
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        (packed / name).write_text("{}")
    roundel.convert(packed, out, format=to, requantize=to == "fake")
    ours, theirs = open_checkpoint(out), open_checkpoint(packed)
    assert len(biases) == 6
    assert all(torch.equal(ours.tensor(name).float(), tensors[name].float()) for name in biases)
    head = ours.tensor("lm_head.weight").float()
    assert torch.equal(
        head, theirs.tensor("lm_head.weight").to(torch.bfloat16 if to == "fake" else torch.float32).float()
    )
    assert (ours.matrices["lm_head"].stored.scheme is not None) == (to != "fake")
    ours.close()
    theirs.close()
    small = ("chat_template.jinja", "generation_config.json", "additional_chat_templates/tools.jinja", "tokenizer.json")
    assert all((out / name).read_bytes() == (model / name).read_bytes() for name in small)
    assert not any(
        (out / name).exists() for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
    )
    assert load_tokenizer(out).chat_template


def test_an_order_of_columns_goes_along_or_is_refused(tmp_path: Path) -> None:
    wish: dict[str, Any] = {
        "algorithm": "gptq",
        "scheme": "W4A16G32",
        "dataset": "bundled",
        "nsamples": 4,
        "seqlen": 32,
    }
    roundel.quantize(bundled_model(), tmp_path / "in", format="auto_gptq", act_order=True, **wish)
    roundel.convert(tmp_path / "in", tmp_path / "out", format="gptq_v2")
    ours, theirs = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "in")
    for name in theirs.layers:
        assert torch.equal(ours.decode(name), theirs.decode(name))
    ours.close()
    theirs.close()
    for to in ("auto_awq", "llm_compressor", "mlx"):
        with pytest.raises(PlanError, match=r"group index|which group each column belongs to"):
            roundel.convert(tmp_path / "in", tmp_path / to, format=to)
