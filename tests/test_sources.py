"""Every kind of source goes through the stream and comes back as close as its grid allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import roundel
from models.pico import PICO_TYPES, build, build_fp8, build_mxfp4, build_nvfp4
from roundel.checkpoint import open_checkpoint
from roundel.tensor import plain
from roundel.verification import verify

STREAMED = [t for t in PICO_TYPES if t != "gpt2"]  # every matrix of GPT-2 is kept


@pytest.mark.parametrize("model_type", STREAMED)
def test_every_family_is_rounded_and_verified(model_type: str, tmp_path: Path) -> None:
    source = build(model_type, tmp_path / "m", shards=2)
    report = roundel.quantize(source, tmp_path / "o", scheme="W8A16G32")
    assert report.mean_sqnr > 35
    found = verify(tmp_path / "o", source)
    assert found.passed, found.problems[:5]
    assert len([c for c in found.checks if c.sqnr is not None]) == len(report.plan.layers)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_source_dtypes(dtype: str, tmp_path: Path) -> None:
    source = build("llama", tmp_path / "m", dtype=dtype)
    roundel.quantize(source, tmp_path / "o", scheme="W4A16G32")
    assert verify(tmp_path / "o", source).passed


@pytest.mark.parametrize("kind", ["block", "tensor", "channel"])
def test_fp8_sources(kind: str, tmp_path: Path) -> None:
    source = build_fp8(tmp_path / "m", kind)
    report = roundel.quantize(source, tmp_path / "o", scheme="W8A16G32", ignore_layers=["down_proj"])
    assert report.mean_sqnr > 35
    tensors = load_file(tmp_path / "o" / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16  # kept means decoded, not FP8
    assert not any("weight_scale" in name for name in tensors)
    assert verify(tmp_path / "o", source).passed


@pytest.mark.parametrize("naming", ["compressed-tensors", "modelopt"])
def test_nvfp4_sources(naming: str, tmp_path: Path) -> None:
    source = build_nvfp4(tmp_path / "m", naming)
    assert roundel.quantize(source, tmp_path / "o", scheme="W8A16G32").mean_sqnr > 35
    assert verify(tmp_path / "o", source).passed


def test_mxfp4_source_moves_over_without_rounding(tmp_path: Path) -> None:
    source = build_mxfp4(tmp_path / "m")
    report = roundel.quantize(source, tmp_path / "o", scheme="MXFP4", format="llm_compressor")
    assert all(row.sqnr == float("inf") for row in report.rounded)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "o" / "model.safetensors")
    for name in after:
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name


def test_gpt_oss_experts_are_split_from_interleaved_rows(tmp_path: Path) -> None:
    source = build("gpt_oss", tmp_path / "m")
    roundel.quantize(
        source, tmp_path / "o", scheme="MXFP4", format="llm_compressor", layer_config={"self_attn": {"bits": 16}}
    )
    checkpoint, raw = open_checkpoint(source), load_file(source / "model.safetensors")
    written = load_file(tmp_path / "o" / "model.safetensors")
    blocks = raw["model.layers.0.mlp.experts.gate_up_proj_blocks"]
    assert torch.equal(written["model.layers.0.mlp.experts.1.up_proj.weight_packed"], blocks[1, 1::2].flatten(1))
    assert torch.equal(
        written["model.layers.0.mlp.experts.1.gate_proj.bias"],
        raw["model.layers.0.mlp.experts.gate_up_proj_bias"][1, 0::2],
    )
    assert any(
        "without rounding" in note for note in roundel.plan(source, scheme="MXFP4", format="llm_compressor").notes
    )
    checkpoint.close()


@pytest.mark.parametrize("asked", ["W4A16G32", "W3A16G32_ASYM", "W2A16G32"])
def test_our_own_files_convert_without_loss(asked: str, tmp_path: Path) -> None:
    source = build("llama", tmp_path / "m")
    roundel.quantize(source, tmp_path / "gptq", scheme=asked, format="auto_gptq")
    report = roundel.quantize(tmp_path / "gptq", tmp_path / "round", scheme=asked, format="auto_round")
    again = roundel.quantize(tmp_path / "round", tmp_path / "back", scheme=asked, format="auto_gptq")
    assert all(row.sqnr == float("inf") for row in (*report.rounded, *again.rounded))
    one, other = load_file(tmp_path / "gptq" / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_awq_round_trip_and_requantizing(tmp_path: Path) -> None:
    source = build("llama", tmp_path / "m")
    roundel.quantize(source, tmp_path / "awq", scheme="W4A16G32_ASYM", format="auto_awq")
    report = roundel.quantize(tmp_path / "awq", tmp_path / "same", scheme="W4A16G32_ASYM", format="auto_round")
    assert all(row.sqnr == float("inf") for row in report.rounded)
    report = roundel.quantize(tmp_path / "awq", tmp_path / "eight", scheme="W8A16G32")  # which holds every code
    assert report.mean_sqnr == float("inf")
    report = roundel.quantize(tmp_path / "awq", tmp_path / "three", scheme="W3A16G32")
    assert 10 < report.mean_sqnr < 30
    assert verify(tmp_path / "eight", tmp_path / "awq").passed


def test_companions_in_other_shards_are_found(tmp_path: Path) -> None:
    source = build_fp8(tmp_path / "m", "block")
    checkpoint = open_checkpoint(source)
    expected = checkpoint.decode("model.layers.0.mlp.up_proj")
    checkpoint.close()
    from safetensors.torch import save_file

    tensors = load_file(source / "model.safetensors")
    scales = {n: t for n, t in tensors.items() if n.endswith("_inv")}
    rest = {n: t for n, t in tensors.items() if n not in scales}
    (source / "model.safetensors").unlink()
    save_file(rest, source / "model-00001-of-00002.safetensors")
    save_file(scales, source / "model-00002-of-00002.safetensors")
    weight_map = {
        **dict.fromkeys(rest, "model-00001-of-00002.safetensors"),
        **dict.fromkeys(scales, "model-00002-of-00002.safetensors"),
    }
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(source)
    assert torch.equal(checkpoint.decode("model.layers.0.mlp.up_proj"), expected)
    checkpoint.close()


def test_several_formats_in_one_pass_equal_one_by_one(tmp_path: Path) -> None:
    source = build("llama", tmp_path / "m")
    roundel.quantize(source, tmp_path / "both", scheme="W4A16G32", format="auto_round,auto_gptq,auto_awq")
    for name in ("auto_round", "auto_gptq", "auto_awq"):
        roundel.quantize(source, tmp_path / name, scheme="W4A16G32", format=name)
        together = (tmp_path / "both" / name / "model.safetensors").read_bytes()
        assert together == (tmp_path / name / "model.safetensors").read_bytes()


def test_quantized_head_of_a_tied_model(tmp_path: Path) -> None:
    import json

    source = build("llama", tmp_path / "m", tie_word_embeddings=True)
    roundel.quantize(source, tmp_path / "o", scheme="W8A16G32", quant_lm_head=True)
    assert json.loads((tmp_path / "o" / "config.json").read_text())["tie_word_embeddings"] is False
    found = verify(tmp_path / "o", source)
    assert found.passed, found.problems
    assert any(c.name == "lm_head" for c in found.checks)


def test_fp8_with_power_of_two_scales(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = build_fp8(tmp_path / "m", "block")
    tensors = load_file(source / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_inv")]:
        tensors[name] = torch.exp2(torch.round(torch.log2(tensors[name].float()))).to(torch.float8_e8m0fnu)
    save_file(tensors, source / "model.safetensors")
    assert roundel.quantize(source, tmp_path / "o", scheme="W8A16G32").mean_sqnr > 35
    assert verify(tmp_path / "o", source).passed


def test_fp8_that_nothing_explains_is_refused(tmp_path: Path) -> None:
    import json

    from roundel.errors import SourceError

    source = build_fp8(tmp_path / "m", "tensor")
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="does not say how it is scaled"):
        roundel.plan(source, scheme="W4A16G32")


def test_conv1d_is_not_rounded_even_when_named(tmp_path: Path) -> None:
    from roundel.errors import PlanError

    source = build("gpt2", tmp_path / "m")
    with pytest.raises(PlanError, match=r"every matrix is kept .*Conv1D"):
        roundel.plan(source, scheme="W4A16G32")
    checkpoint = open_checkpoint(source)
    name = next(m.name for m in checkpoint.matrices.values() if (m.reason or "").startswith("Conv1D"))
    checkpoint.close()
    with pytest.raises(PlanError, match="cannot be rounded"):
        roundel.plan(source, scheme="W4A16G32", layer_config={name: "W8A16G32"})


@pytest.mark.parametrize("chain", ["rtn", "opt-rtn --imatrix"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_stays_keeps_its_dtype_and_config_its_word(dtype: str, chain: str, tmp_path: Path) -> None:
    """auto-round writes float32 where its config says bfloat16, and float16 where tensors are bfloat16."""
    source = build("llama", tmp_path / "m", dtype=dtype)
    wish: dict[str, Any] = {"scheme": "W4A16G32_ASYM", "format": "auto_round,auto_gptq,auto_awq,llm_compressor"}
    if chain != "rtn":
        wish |= {"algorithm": "opt-rtn", "imatrix": True, "dataset": [list(range(32))] * 2, "nsamples": 2, "seqlen": 32}
    roundel.quantize(source, tmp_path / "o", **wish)
    before, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    for format in wish["format"].split(","):
        after = load_file(tmp_path / "o" / format / "model.safetensors")
        stay = before.keys() & after.keys()
        assert len(stay) == 7  # the embedding, the head, norms
        assert all(after[n].dtype == before[n].dtype and torch.equal(after[n], before[n]) for n in stay)
        written = json.loads((tmp_path / "o" / format / "config.json").read_text())
        assert written == config | {"quantization_config": written["quantization_config"]}


@pytest.mark.parametrize("format", ["auto_round", "auto_gptq", "gptq_v2", "auto_awq", "llm_compressor"])
@pytest.mark.parametrize("sym", [True, False])
def test_a_row_may_be_one_group(format: str, sym: bool, tmp_path: Path) -> None:
    """auto-round without a model rounds no layer then, warns of each, and ends as if all were well."""
    source = build("llama", tmp_path / "m")
    report = roundel.quantize(source, tmp_path / "o", bits=4, group_size=-1, sym=sym, format=format)
    assert len(report.rounded) == 14
    assert verify(tmp_path / "o", source).passed
    checkpoint = open_checkpoint(tmp_path / "o")
    for layer in checkpoint.layers.values():
        assert plain(checkpoint.unpack(layer).scale).shape == (layer.shape[0], 1)
    checkpoint.close()
