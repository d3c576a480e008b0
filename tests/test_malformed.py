"""Checkpoints whose sound files say senseless things: each is read or refused, and never crashes anything."""

from __future__ import annotations

import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import pytest

import roundel
from models.pico import build, build_fp8, build_mxfp4, build_nvfp4
from models.raw import raw_file
from roundel.checkpoint import open_checkpoint
from roundel.errors import GridError, PlanError, QuantizationError, SourceError
from roundel.inspection import inspect_checkpoint
from roundel.tensor import ITEMSIZE
from roundel.verification import verify

Header = dict[str, dict[str, Any]]
UP = "model.layers.0.mlp.up_proj"


def header_of(folder: Path) -> Header:
    raw = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header: Header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    return header


def write(folder: Path, header: Header, config: dict[str, Any]) -> Path:
    """A sound file of zeros for a header whose offsets do not matter."""
    folder.mkdir(exist_ok=True)
    cursor = 0
    for entry in header.values():
        size = math.prod(entry["shape"]) * ITEMSIZE[entry["dtype"]]
        entry["data_offsets"] = [cursor, cursor + size]
        cursor += size
    (folder / "config.json").write_text(json.dumps(config))
    raw_file(folder / "model.safetensors", header, bytes(cursor))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def packed(folder: Path, **options: Any) -> Path:
    model = build("llama", folder / "plain")
    roundel.quantize(model, folder / "packed", **options)
    return folder / "packed"


@pytest.mark.parametrize(
    ("part", "change", "why"),
    [
        ("qweight", {"dtype": "F32"}, "qweight or qzeros are not int32"),
        ("scales", {"dtype": "I16"}, "its scales no floats"),
        ("qweight", {"shape": [8, 8, 16]}, "do not fit together"),
        ("qweight", {"shape": [8, 120]}, "do not fit together"),
        ("scales", {"shape": [0, 128]}, "do not fit together"),
        ("qzeros", {"shape": [1, 15]}, "do not fit together"),
    ],
)
def test_words_that_do_not_fit(part: str, change: dict[str, Any], why: str, tmp_path: Path) -> None:
    folder = packed(tmp_path)
    header, config = header_of(folder), config_of(folder)
    header[f"{UP}.{part}"] |= change
    write(folder, header, config)
    for read in (roundel.plan, verify):
        with pytest.raises(SourceError, match=f"{UP}: .*({why})"):
            read(folder)


@pytest.mark.parametrize("group_size", [None, "many", {}, -7, 1.5])
def test_a_group_size_that_is_none(group_size: object, tmp_path: Path) -> None:
    folder = packed(tmp_path)
    config = config_of(folder)
    config["quantization_config"]["group_size"] = group_size
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"the config's group_size is .* Mend its quantization_config"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["weight", ".weight", "", ".", "bias", "x", "[/].weight"])
def test_names_without_a_module_are_copied(name: str, tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "model")
    header = header_of(folder)
    header[name] = {"dtype": "BF16", "shape": [64, 64]}
    write(folder, header, config_of(folder))
    roundel.quantize(folder, tmp_path / "out", ignore_layers=[r"\[/\]"] if "[" in name else [])
    assert verify(tmp_path / "out", folder).passed
    assert inspect_checkpoint(open_checkpoint(tmp_path / "out")).name == "out"
    assert name in header_of(tmp_path / "out")


@pytest.mark.parametrize("name", [f"{UP}.qweight", UP])
def test_a_name_in_the_way_of_a_layer(name: str, tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "model")
    header = header_of(folder)
    header[name] = {"dtype": "I32", "shape": [8, 128]}
    write(folder, header, config_of(folder))
    with pytest.raises(PlanError, match=f"would need the name '{name}' twice"):
        roundel.plan(folder)
    roundel.plan(folder, ignore_layers=[UP])


def test_double_precision_is_rounded_too(tmp_path: Path) -> None:
    single, double = (
        build("llama", tmp_path / "single", dtype="float32"),
        build("llama", tmp_path / "double", "float64"),
    )
    for model in (single, double):
        roundel.quantize(model, tmp_path / f"{model.name}-out", ignore_layers=["lm_head"])
    checkpoints = [open_checkpoint(tmp_path / f"{name}-out") for name in ("single", "double")]
    assert bool((checkpoints[0].decode(UP) == checkpoints[1].decode(UP)).all())
    for checkpoint in checkpoints:
        checkpoint.close()


def mutated(header: Header, config: dict[str, Any], chance: random.Random) -> tuple[Header, dict[str, Any]]:
    header, config = json.loads(json.dumps([header, config]))
    junk = [None, 0, -1, 3, "x", "", [], {}, [1], {"a": 1}, 1e9, True]
    for _ in range(chance.randrange(1, 4)):
        name = chance.choice(list(header))
        shape = header[name]["shape"]
        action = chance.randrange(6)
        if action == 0 and len(header) > 1:
            header.pop(name)
        elif action == 1:
            shapes = [[], [0], [0, 64], [64, 0], [2, 3, 4], [1, 1, 1, 1], shape[::-1], [n + 1 for n in shape]]
            header[name]["shape"] = chance.choice(shapes)
        elif action == 2:
            header[name]["dtype"] = chance.choice(list(ITEMSIZE))
        elif action == 3:
            header[chance.choice(["", "weight", ".weight", f"{name}.weight", "a..qweight", "lm_head"])] = header.pop(
                name
            )
        elif action == 4:
            settings = config.get("quantization_config")
            settings = settings if isinstance(settings, dict) and settings else config
            settings[chance.choice(list(settings))] = chance.choice(junk)
        else:
            methods = ["gptq", "awq", "fp8", "compressed-tensors", "modelopt", "mxfp4", "auto-round", 3, None]
            config["quantization_config"] = {"quant_method": chance.choice(methods)}
    return header, config


def test_mutated_checkpoints_are_read_or_refused(tmp_path: Path) -> None:
    chance = random.Random(5)
    folders = [build(kind, tmp_path / kind) for kind in ("llama", "qwen3_moe", "gpt_oss")]
    folders += [build_fp8(tmp_path / "fp8"), build_mxfp4(tmp_path / "mxfp4"), build_nvfp4(tmp_path / "nvfp4")]
    folders += [packed(tmp_path / kind, format=kind, scheme="W4A16G32_ASYM") for kind in ("auto_round", "auto_gptq")]
    models = [(header_of(folder), config_of(folder)) for folder in folders]
    for number in range(60):
        folder = write(tmp_path / "mutated", *mutated(*chance.choice(models), chance))
        for read in (open_checkpoint, verify, roundel.plan):
            try:
                read(folder)
            except GridError as error:
                pytest.fail(f"mutation {number}: {error}")
            except QuantizationError as error:
                assert str(error)
