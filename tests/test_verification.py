"""Verification finds what it is there to find."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import roundel
from commands import command
from models.pico import PICO_TYPES, build
from models.raw import plant, poke, raw_file, spot
from roundel.checkpoint import open_checkpoint
from roundel.data.bundled import bundled_model
from roundel.errors import SourceError
from roundel.verification import Verification, verify

NAME = "model.layers.1.mlp.up_proj"
NAN16 = b"\x00\x7e"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build("llama", tmp_path / "model")


@pytest.fixture
def out(model: Path, tmp_path: Path) -> Path:
    roundel.quantize(model, tmp_path / "out", shard_size="40KB")
    return tmp_path / "out"


def problem(found: Verification) -> str:
    """The one problem there is."""
    assert not found.passed and len(found.problems) == 1, found.problems
    return found.problems[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scheme": "W3A16G32_ASYM"},
        {"scheme": "W4A16G32_ASYM", "format": "auto_awq"},
        {"scheme": "MXFP4"},
        {"scheme": "MXFP8", "format": "llm_compressor"},
        {"scheme": "FP8_BLOCK", "format": "llm_compressor"},  # whose readers compute in bfloat16
        {"scheme": "FP8_BLOCK", "format": "fp8"},
        {"scheme": "W8A16G64_ASYM", "format": "mlx"},  # whose biases are rounded
        {"quant_lm_head": True, "ignore_layers": ["layers.0"]},
    ],
)
def test_all_is_well(options: dict[str, object], model: Path, tmp_path: Path) -> None:
    report = roundel.quantize(model, tmp_path / "out", **options)  # type: ignore[arg-type]
    told: list[str] = []
    alone, against = verify(tmp_path / "out"), verify(tmp_path / "out", model, told.append)
    assert alone.passed and alone.against is None and alone.mean_sqnr is None
    assert against.passed and against.against == "model" and told == [check.name for check in against.checks]
    assert against.mean_sqnr == pytest.approx(report.mean_sqnr, abs=0.01)
    assert against.worst is not None and report.worst is not None and against.worst.name == report.worst.name
    packed = {check.name for check in against.checks if check.sqnr is not None}
    assert packed == {layer.name for layer in report.plan.layers}


def test_the_report_speaks_of_the_first_of_several_formats(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {f"{NAME}.weight": -tensors[f"{NAME}.weight"].abs()}, model / "model.safetensors")
    roundel.quantize(model, tmp_path / "out", scheme="W8A16G64_ASYM", format="mlx,auto_round")  # zero points up to 255
    mlx, plain = (verify(tmp_path / "out" / name, model) for name in ("mlx", "auto_round"))
    assert mlx.passed and plain.passed, plain.problems
    assert mlx.mean_sqnr is not None and plain.mean_sqnr is not None and mlx.mean_sqnr < plain.mean_sqnr


def test_a_conversion_is_held_to_its_own_source(model: Path, out: Path, tmp_path: Path) -> None:
    roundel.convert(out, tmp_path / "exact", format="auto_round")
    roundel.convert(out, tmp_path / "anew", format="fp8", requantize=True)
    for folder in ("exact", "anew"):
        assert verify(tmp_path / folder, out).passed
        assert verify(tmp_path / folder, model).passed  # further from it than from what was converted
    poke(tmp_path / "exact", f"{NAME}.qweight", 512, b"\x88")
    assert problem(verify(tmp_path / "exact", out)) == (
        f"{NAME}: it differs from the source, whose numbers were moved as they are"
    )


def test_floats_of_a_conversion_are_held_to_its_source(tmp_path: Path) -> None:
    roundel.quantize(bundled_model(), tmp_path / "out")
    roundel.convert(tmp_path / "out", tmp_path / "floats", format="gguf:f32")
    assert verify(tmp_path / "floats", tmp_path / "out").passed
    assert verify(tmp_path / "floats", bundled_model()).passed
    file = next((tmp_path / "floats").glob("*.gguf"))
    raw = file.read_bytes()
    checkpoint = open_checkpoint(file)
    _, begin = checkpoint.source.place(f"{NAME}.weight")
    checkpoint.close()
    file.write_bytes(raw[:begin] + b"\x00\x00\x80\x3f" + raw[begin + 4 :])  # 1.0
    assert problem(verify(tmp_path / "floats", tmp_path / "out")).startswith(f"{NAME}: it differs from the source")


def test_tied_heads_and_experts(tmp_path: Path) -> None:
    for model_type, options in (("gemma2", {"quant_lm_head": True}), ("gpt_oss", {}), ("qwen3_moe", {})):
        model, out = build(model_type, tmp_path / model_type), tmp_path / f"{model_type}-out"
        roundel.quantize(model, out, scheme="W8A16", **options)  # type: ignore[arg-type]
        assert verify(out, model).problems == ()


@pytest.mark.parametrize("model_type", PICO_TYPES)
def test_every_family_is_what_its_config_describes(model_type: str, tmp_path: Path) -> None:
    assert verify(build(model_type, tmp_path / "model")).problems == ()


@pytest.mark.parametrize(("key", "tensor"), [("intermediate_size", "mlp.down_proj"), ("vocab_size", "embed_tokens")])
def test_a_config_that_describes_another_model(key: str, tensor: str, out: Path) -> None:
    path = out / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {key: 2 * config[key]}))
    found = verify(out)
    assert not found.passed and any(f"{tensor}.weight is" in problem for problem in found.problems)


def test_a_kept_tensor_without_elements(model: Path, tmp_path: Path) -> None:
    raw_file(model / "empty.safetensors", {"none": {"dtype": "BF16", "shape": [0, 4], "data_offsets": [0, 0]}})
    roundel.quantize(model, tmp_path / "out")
    assert verify(tmp_path / "out", model).problems == ()


def test_a_flipped_byte_of_codes(model: Path, out: Path) -> None:
    path, begin, end = spot(out, f"{NAME}.qweight")
    with path.open("r+b") as file:
        file.seek((begin + end) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x88]))
    assert verify(out).passed, "without the source any code is as good as another"
    found = problem(verify(out, model))
    assert found.startswith(f"{NAME}: signal to noise is ") and "the run that wrote it reported" in found


@pytest.mark.parametrize("value", [NAN16, struct.pack("<e", float("inf"))])
def test_a_scale_that_is_not_finite(value: bytes, model: Path, out: Path) -> None:
    poke(out, f"{NAME}.scales", 2 * 7, value)  # of row 7
    for against in (None, model):
        assert problem(verify(out, against)).startswith(f"{NAME}: weight [7, ")


def test_a_scale_that_is_wrong(model: Path, out: Path) -> None:
    poke(out, f"{NAME}.scales", 0, struct.pack("<e", 300.0))
    assert verify(out).passed
    assert "further from the source than zeros are" in problem(verify(out, model))


def test_a_zero_point_that_is_wrong(out: Path) -> None:
    poke(out, f"{NAME}.qzeros", 0, b"\x11")
    assert "stored zero point is not 8" in problem(verify(out))


def test_a_kept_tensor_that_changed(model: Path, out: Path) -> None:
    poke(out, "model.norm.weight", 4, b"\x00\x00")
    assert verify(out).passed
    assert problem(verify(out, model)) == "model.norm.weight: it differs from the source, and was to be kept"


def test_a_kept_tensor_that_is_not_finite(model: Path, out: Path) -> None:
    plant(out, "lm_head.weight", 70, math.nan)
    for against in (None, model):
        assert problem(verify(out, against)).startswith("lm_head.weight: value 70 of rows 0 to ")


def removed(out: Path, tensor: str) -> None:
    """Rewrite a file without one of its tensors, as a sound file."""
    path, begin, end = spot(out, tensor)
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    gone = header.pop(tensor)["data_offsets"]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= gone[1]:
            entry["data_offsets"] = [at - (gone[1] - gone[0]) for at in entry["data_offsets"]]
    raw_file(path, header, raw[8 + length : begin] + raw[end:])
    index = json.loads((out / "model.safetensors.index.json").read_text())
    del index["weight_map"][tensor]
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("tensor", "alone", "against"),
    [
        (f"{NAME}.scales", f"{NAME} has qweight and no scales", f"{NAME} has qweight and no scales"),
        (f"{NAME}.qweight", f"{NAME}: it is missing", f"{NAME}: it is missing"),
        ("model.norm.weight", None, "model.norm.weight: it is missing"),
        ("lm_head.weight", None, "lm_head: it is missing"),
    ],
)
def test_a_tensor_that_is_gone(tensor: str, alone: str | None, against: str, model: Path, out: Path) -> None:
    removed(out, tensor)
    for source, expected in ((None, alone), (model, against)):
        if expected is None:
            assert verify(out, source).passed
        elif "no scales" in expected:
            with pytest.raises(SourceError, match=expected):
                verify(out, source)
        else:
            assert expected in verify(out, source).problems


def test_another_source(out: Path, tmp_path: Path) -> None:
    found = verify(out, build("llama", tmp_path / "other", seed=1))
    assert len(found.problems) == 21
    found = verify(out, build("llama", tmp_path / "wider", intermediate_size=256))
    assert f"{NAME}: it is [128, 64], in the source [256, 64]" in found.problems


@pytest.mark.parametrize("report", ["", "[]", '{"rows": 3}', '{"rows": [{"name": "x"}]}', '{"rows": [3]}'])
def test_a_broken_report_is_no_matter(report: str, model: Path, out: Path) -> None:
    (out / "report.json").write_text(report)
    assert verify(out, model).passed


def test_not_everything_is_a_checkpoint(model: Path, out: Path) -> None:
    (shard, *_) = sorted(out.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 100)
    with pytest.raises(SourceError, match=f"{shard.name} cannot be read: .*truncated"):
        verify(out, model)
    assert verify(model).passed, "a model that is not packed is looked through all the same"


@pytest.mark.parametrize(
    ("harm", "code", "why"),
    [
        (lambda out: None, 0, "14 layers and 7 other tensors are whole and finite"),
        (lambda out: poke(out, f"{NAME}.scales", 0, NAN16), 7, f"- {NAME}: weight [0, 0] is nan"),
        (lambda out: removed(out, "model.norm.weight"), 7, "- model.norm.weight: it is missing"),
        (lambda out: os.truncate(next(out.glob("*-00001-*")), 900), 5, "cannot be read"),
        (lambda out: (out / "config.json").unlink(), 5, "is not a model folder"),
    ],
)
def test_the_exit_code_tells(harm: Callable[[Path], object], code: int, why: str, model: Path, out: Path) -> None:
    harm(out)
    found = command("verify", out, "--against", model)
    assert found.code == code
    assert why in (found.output if code == 0 else found.error)


def test_rescaled_weights_are_told_from_bad_ones(model: Path, tmp_path: Path) -> None:
    tokens = [[(3 * n + s) % 250 for n in range(32)] for s in range(4)]
    roundel.quantize(model, tmp_path / "moved", algorithm="smoothquant", dataset=tokens, nsamples=4, seqlen=32)
    told = command("verify", tmp_path / "moved", "--against", model)
    assert told.code == 0 and "whose weights a transform rescaled: no measure of quality" in told.output
    roundel.quantize(model, tmp_path / "plain")
    assert "rescaled" not in command("verify", tmp_path / "plain", "--against", model).output
