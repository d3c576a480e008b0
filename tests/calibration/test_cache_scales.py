"""Scales of keys and values: the largest that enters the cache of the model itself; resumed, refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

import roundel
from models.pico import build
from models.raw import hashes
from roundel.checkpoint import open_checkpoint
from roundel.errors import PlanError, RecipeError
from roundel.evaluation.models import decoded_model
from victim import Victims

IDS = torch.randint(3, 60, (3, 16), generator=torch.Generator().manual_seed(1)).tolist()
CACHED: dict[str, Any] = {"scheme": "FP8_DYNAMIC", "format": "llm_compressor", "kv_cache": "fp8", "seqlen": 16}
CACHED |= {"dataset": IDS, "nsamples": 3}


@pytest.fixture(scope="module")
def victims() -> Iterator[Victims]:
    served = Victims()
    yield served
    served.close()


def largest_cached(source: Path, rounded: Path, block: int) -> tuple[float, float]:
    """max|keys| and max|values| that a block caches, the blocks before it being rounded."""
    checkpoint = open_checkpoint(rounded)
    before = [name for name in checkpoint.layers if int(name.split(".")[2]) < block]
    model: Any = decoded_model(source, {name: checkpoint.decode(name) for name in before})
    checkpoint.close()
    cache = DynamicCache()
    with torch.no_grad():
        model.float()(input_ids=torch.tensor(IDS), past_key_values=cache, use_cache=True)
    return float(cache.layers[block].keys.abs().max()), float(cache.layers[block].values.abs().max())


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "phi3"])
def test_scales_are_those_of_what_the_model_caches(model_type: str, tmp_path: Path) -> None:
    source = build(model_type, tmp_path / "model", dtype="float32")
    roundel.quantize(source, tmp_path / "out", **CACHED)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for block in (0, 1):
        keys, values = largest_cached(source, tmp_path / "out", block)
        for part, largest in (("k_scale", keys), ("v_scale", values)):
            scale = tensors[f"model.layers.{block}.self_attn.{part}"]
            assert (scale.dtype, scale.shape) == (torch.float32, (1,))
            assert float(scale) == pytest.approx(largest / 448, rel=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == {
        "dynamic": False, "num_bits": 8, "strategy": "tensor", "symmetric": True, "type": "float",
    }  # fmt: skip


def test_with_an_algorithm_of_several_blocks_at_a_time(tmp_path: Path) -> None:
    source = build("llama", tmp_path / "model", dtype="float32")
    options = CACHED | {"scheme": "W4A16G32", "algorithm": "signround", "iters": 1, "blocks": 2}
    roundel.quantize(source, tmp_path / "out", **options)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    keys, values = largest_cached(source, tmp_path / "out", 0)
    assert float(tensors["model.layers.0.self_attn.k_scale"]) == pytest.approx(keys / 448, rel=1e-4)
    assert float(tensors["model.layers.0.self_attn.v_scale"]) == pytest.approx(values / 448, rel=1e-4)
    assert "model.layers.1.self_attn.v_scale" in tensors


def test_measured_anew_where_the_source_has_them(tmp_path: Path) -> None:
    source = build("llama", tmp_path / "model")
    roundel.quantize(source, tmp_path / "one", **CACHED)
    roundel.quantize(tmp_path / "one", tmp_path / "two", **CACHED)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert float(second["model.layers.0.self_attn.k_scale"]) > 0


def test_killed_and_continued(tmp_path: Path, victims: Victims) -> None:
    source = build("llama", tmp_path / "model")
    options = CACHED | {"dataset": str(tmp_path / "tokens.jsonl")}
    (tmp_path / "tokens.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in IDS))
    roundel.quantize(source, tmp_path / "whole" / "out", **options)
    for number in (25, 50):
        out = tmp_path / str(number) / "out"
        assert victims.killed_at(number, source, out, **options)
        roundel.quantize(source, out, **options)
        assert hashes(out) == hashes(tmp_path / "whole" / "out")


def test_refused_where_there_is_no_place_or_nothing_to_measure(tmp_path: Path) -> None:
    llama = build("llama", tmp_path / "llama")
    with pytest.raises(PlanError, match="auto_round has no place for scales of keys and values"):
        roundel.plan(llama, kv_cache="fp8")
    latent = build("deepseek_v3", tmp_path / "latent")
    with pytest.raises(PlanError, match="latent attention"):
        roundel.plan(latent, kv_cache="fp8", format="llm_compressor", scheme="FP8_DYNAMIC")
    with pytest.raises(RecipeError, match="kv_cache='int8' is not possible"):
        roundel.plan(llama, kv_cache="int8")
