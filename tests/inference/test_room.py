"""Loading takes little more memory than the packed model, and what it takes is known beforehand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import roundel
from models.pico import build
from roundel.checkpoint import open_checkpoint
from roundel.inference.room import needed_bytes

SHAPE = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8}
CALLS = ("roundel.load(sys.argv[1])", "AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)")
PROGRAM = """
import sys, torch, roundel
from transformers import AutoModelForCausalLM
from roundel.memory import peak_memory
model = {call}
loaded = peak_memory()
model(input_ids=torch.zeros((1, 1), dtype=torch.long))
print(loaded)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, which is Linux's")
def test_a_larger_model_takes_what_its_packed_weights_do(tmp_path: Path) -> None:
    peaks: dict[str, list[int]] = {call: [] for call in CALLS}
    sizes, known = [], []
    for layers in (2, 26):
        source = build("llama", tmp_path / f"m{layers}", num_hidden_layers=layers, head_dim=64, **SHAPE)
        out = tmp_path / f"o{layers}"
        roundel.quantize(source, out, scheme="W4A16", workers=1)
        sizes.append(sum(file.stat().st_size for file in out.glob("*.safetensors")))
        checkpoint = open_checkpoint(out)
        known.append(needed_bytes(checkpoint, "cpu", torch.float32))
        checkpoint.close()
        for call in CALLS:
            program = [sys.executable, "-c", PROGRAM.format(call=call), out]
            peaks[call].append(int(subprocess.run(program, capture_output=True, text=True, check=True).stdout))
    grown = sizes[1] - sizes[0]
    assert grown > 100e6
    assert known[1] - known[0] == pytest.approx(grown, rel=0.02)
    for call in CALLS:
        small, large = peaks[call]
        assert large - small < 1.2 * grown, call
        assert small < sizes[0] + 700e6, call  # what the libraries take
