"""Beside llm-compressor on the same tensors: what it makes equal is equal in our files, and our errors are no larger.

It lives in an environment of its own (`.peers/llmcompressor`, or `$ROUNDEL_PEERS/llmcompressor`); without it these
tests skip.
"""

from __future__ import annotations

import json
import os
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import roundel
from models.pico import build
from peers.make_models import write_tokenizer
from roundel.checkpoint import open_checkpoint

HERE = Path(__file__).parent
PEERS = Path(os.environ.get("ROUNDEL_PEERS", HERE.parents[1] / ".peers"))
PYTHON = PEERS / "llmcompressor" / "bin" / "python"
FLOAT = ".weight_global_scale"

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"llm-compressor is not installed: no {PYTHON}")


def run(*arguments: object) -> None:
    command = [PYTHON, HERE / "run_llm_compressor.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(str(arguments[1])).parent)
    assert done.returncode == 0, done.stderr


def errors(source: Path, rounded: Path) -> dict[str, float]:
    """Squared error of each rounded layer."""
    exact, found = open_checkpoint(source), open_checkpoint(rounded)
    layers = found.layers
    result = {name: float((exact.decode(name) - found.decode(name)).double().square().sum()) for name in layers}
    exact.close()
    found.close()
    return result


def test_nvfp4_is_no_worse_and_shares_the_same_floats(tmp_path: Path) -> None:
    source = build("llama", tmp_path / "model", hidden_size=128, intermediate_size=256)
    roundel.quantize(source, tmp_path / "ours", scheme="NVFP4A16", format="llm_compressor")
    run(source, tmp_path / "theirs", "NVFP4A16")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    shared = [name for name in ours if name.endswith(FLOAT)]
    assert shared
    assert shared == [name for name in theirs if name.endswith(FLOAT)]
    for name in shared:  # theirs are computed in bfloat16, in a few steps
        torch.testing.assert_close(ours[name], theirs[name], rtol=2**-7, atol=0)
    for one, other in pairwise(shared):
        assert torch.equal(ours[one], ours[other]) == torch.equal(theirs[one], theirs[other])
    own, other = errors(source, tmp_path / "ours"), errors(source, tmp_path / "theirs")
    assert own.keys() == other.keys()
    assert sum(own.values()) <= sum(other.values()) * 1.0001


def test_scales_of_keys_and_values(tmp_path: Path) -> None:
    """Both are measured on what rounded blocks hand on. Theirs round inputs there, too, so the second block's differ a
    little."""
    source = build("qwen3", tmp_path / "model", dtype="float32", hidden_size=128, num_hidden_layers=2)
    write_tokenizer(source)
    ids = torch.randint(3, 60, (8, 32), generator=torch.Generator().manual_seed(3)).tolist()
    (tmp_path / "tokens.json").write_text(json.dumps(ids))
    options = {"dataset": ids, "nsamples": len(ids), "seqlen": len(ids[0]), "kv_cache": "fp8"}
    roundel.quantize(source, tmp_path / "ours", scheme="FP8_DYNAMIC", format="llm_compressor", **options)
    run(source, tmp_path / "theirs", "FP8_DYNAMIC", tmp_path / "tokens.json")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    names = [name for name in ours if name.endswith(("k_scale", "v_scale"))]
    assert len(names) == 4
    for name in names:
        tolerance = 1e-4 if ".layers.0." in name else 0.05
        torch.testing.assert_close(ours[name], theirs[name].float(), rtol=tolerance, atol=0)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    one, other = (config["quantization_config"]["kv_cache_scheme"] for config in configs)
    assert one.items() <= other.items()
