"""Beside llm-compressor on the same tensors: what it makes equal is equal in our files, and our errors are no larger.

It lives in an environment of its own (`.peers/llmcompressor`, or `$ROUNDEL_PEERS/llmcompressor`); without it these
tests skip.
"""

from __future__ import annotations

import os
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import roundel
from models.pico import build
from roundel.checkpoint import open_checkpoint

HERE = Path(__file__).parent
PEERS = Path(os.environ.get("ROUNDEL_PEERS", HERE.parents[1] / ".peers"))
PYTHON = PEERS / "llmcompressor" / "bin" / "python"
FLOAT = ".weight_global_scale"

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"llm-compressor is not installed: no {PYTHON}")


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
    done = subprocess.run(
        [PYTHON, HERE / "run_llm_compressor.py", source, tmp_path / "theirs", "NVFP4A16"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    shared = [name for name in ours if name.endswith(FLOAT)]
    assert shared
    assert shared == [name for name in theirs if name.endswith(FLOAT)]
    for name in shared:  # theirs are computed in bfloat16
        torch.testing.assert_close(ours[name], theirs[name], rtol=2**-8, atol=0)
    for one, other in pairwise(shared):
        assert torch.equal(ours[one], ours[other]) == torch.equal(theirs[one], theirs[other])
    own, other = errors(source, tmp_path / "ours"), errors(source, tmp_path / "theirs")
    assert own.keys() == other.keys()
    assert sum(own.values()) <= sum(other.values()) * 1.0001
