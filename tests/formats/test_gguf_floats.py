"""Models as floats in one GGUF file: every tensor, its dtype and order, what is refused, and what a loss is called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import roundel
from commands import command
from formats.test_gguf import stored, tokenized, written
from formats.test_gguf_reading import OWN, SIZES
from models.as_gguf import FLOATS, gguf_tensors
from models.pico import build, build_fp8
from roundel.checkpoint import open_checkpoint
from roundel.errors import ConversionError, PlanError
from roundel.formats.gguf.changes import is_float32
from roundel.inspection import inspect_checkpoint
from roundel.verification import verify

VALUES = "model.layers.0.self_attn.v_proj"
KINDS = ("f32", "f16", "bf16")


def model_of(model_type: str, folder: Path, **config: object) -> Path:
    return tokenized(build(model_type, folder, **{**SIZES, **OWN.get(model_type, {}), **config}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen2", "qwen3_moe", "gemma2", "phi3"])
def test_every_tensor(model_type: str, kind: str, tmp_path: Path) -> None:
    model = model_of(model_type, tmp_path / "model")
    report = roundel.quantize(model, tmp_path / "out", format=f"gguf:{kind}", workers=2)
    assert report.plan.layers == () and "to " not in report.plan.extent
    path, header = written(tmp_path / "out")
    wanted = gguf_tensors(model)
    assert set(header.tensors) == set(wanted)
    for name, tensor in wanted.items():
        own = "F32" if is_float32(name, tuple(tensor.shape)) else kind.upper()
        assert header.tensors[name].type == own, name
        assert torch.equal(stored(path, header, name), tensor.to(FLOATS[own])), name
    assert header.metadata["general.file_type"].value == {"f32": 0, "f16": 1, "bf16": 32}[kind]
    found = verify(tmp_path / "out", model)
    assert found.passed, found.problems
    checkpoint = open_checkpoint(tmp_path / "out")
    seen = inspect_checkpoint(checkpoint)
    checkpoint.close()
    assert not seen.schemes and max(seen.floats, key=lambda dtype: seen.floats[dtype][1]) == kind.upper()


def test_many_slabs_are_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", tmp_path / "model")
    roundel.quantize(model, tmp_path / "whole", format="gguf:f16")
    monkeypatch.setattr("roundel.matrices.SLAB_BYTES", 1)  # a row, or a head, at a time
    roundel.quantize(model, tmp_path / "slabs", format="gguf:f16")
    assert written(tmp_path / "whole")[0].read_bytes() == written(tmp_path / "slabs")[0].read_bytes()


def test_what_changed_shows(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path / "model")
    roundel.quantize(model, tmp_path / "out", format="gguf:f16")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert any("layers.1.mlp.up_proj" in problem for problem in verify(tmp_path / "out", model).problems)


@pytest.mark.parametrize("value", [70000.0, -1e30])
def test_what_float16_does_not_reach_is_refused(value: float, tmp_path: Path) -> None:
    model = model_of("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"layers\.0\.mlp\.up_proj\.weight .* beyond the end of F16"):
        roundel.quantize(model, tmp_path / "out", format="gguf:f16")
    assert not list((tmp_path / "out").glob("*.gguf"))
    roundel.quantize(model, tmp_path / "out", format="gguf:bf16", overwrite=True)


def test_a_conversion_loses_nothing_unasked(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path / "model")  # in bfloat16, some of whose numbers float16 rounds to 0
    roundel.convert(model, tmp_path / "same", format="gguf:bf16")
    roundel.convert(model, tmp_path / "wider", format="gguf:f32")
    with pytest.raises(ConversionError, match="becomes F16, which does not hold its numbers"):
        roundel.convert(model, tmp_path / "out", format="gguf:f16")
    report = roundel.convert(model, tmp_path / "out", format="gguf:f16", requantize=True)
    assert any("became F16: signal to noise" in (row.note or "") for row in report.rows)
    roundel.quantize(model, tmp_path / "quantized", format="gguf:f16")
    one, two = (written(tmp_path / name)[0].read_bytes() for name in ("out", "quantized"))
    assert one == two


def test_a_quantized_source_is_decoded(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path / "model")
    roundel.quantize(model, tmp_path / "packed", scheme="W4A16G32", format="auto_round")
    with pytest.raises(ConversionError, match="becomes BF16"):
        roundel.convert(tmp_path / "packed", tmp_path / "bf16", format="gguf:bf16")
    roundel.convert(tmp_path / "packed", tmp_path / "f32", format="gguf:f32")
    ours, theirs = open_checkpoint(tmp_path / "f32"), open_checkpoint(tmp_path / "packed")
    for name in theirs.layers:
        assert torch.equal(ours.tensor(f"{name}.weight"), theirs.decode(name)), name
    ours.close()
    theirs.close()
    report = roundel.convert(tmp_path / "packed", tmp_path / "bf16", format="gguf:bf16", requantize=True)
    assert report.converted is not None and report.converted.changed == 14
    roundel.quantize(tokenized(build_fp8(tmp_path / "fp8", **SIZES)), tmp_path / "fp8-bf16", format="gguf:bf16")
    assert verify(tmp_path / "fp8-bf16").passed


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path / "model")
    for other in ("gguf:q8_0", "auto_round"):
        with pytest.raises(PlanError, match="gguf:f16 decides how every tensor is stored"):
            roundel.plan(model, formats=("gguf:f16", other))
    with pytest.raises(PlanError, match="opt-rtn has nothing to choose"):
        roundel.plan(model, format="gguf:f16", algorithm="opt-rtn")


def test_one_layer_may_be_rounded(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path / "model")
    roundel.quantize(model, tmp_path / "out", format="gguf:bf16", layer_config={VALUES: "GGUF:Q8_0"})
    header = written(tmp_path / "out")[1]
    types = {name: tensor.type for name, tensor in header.tensors.items()}
    assert types["blk.0.attn_v.weight"] == "Q8_0" and types["blk.1.attn_v.weight"] == "BF16"


def test_commands(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path / "model")
    planned = command("plan", model, "--format", "gguf:f16")
    assert planned.code == 0 and "no layer is rounded" in planned.output and "F16" in planned.output
    told = json.loads(command("plan", model, "--format", "gguf:f16", "--json").output)
    done = command("quantize", model, tmp_path / "out", "--format", "gguf:f16")
    assert done.code == 0, done.error
    (file,) = (tmp_path / "out").glob("*-F16.gguf")
    assert told["outputs"][0]["files"][0]["bytes"] == file.stat().st_size
    assert command("verify", tmp_path / "out", "--against", model).code == 0
    assert "256×256 F16 16.000" in command("inspect", file).output
