"""Memory of a calibrated run: that of a block, and what the plan says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.pico import build
from peaks import SHAPE, run, where_peaks_are_told


@where_peaks_are_told
@pytest.mark.parametrize("chain", ["gptq", "awq,signround --iters 1 --n-grid 1"])
def test_calibrated_blocks_take_the_same_memory_however_many_there_are(chain: str, tmp_path: Path) -> None:
    """Eight layers hold 226 MB more than two, in float32."""
    data = tmp_path / "tokens.jsonl"
    data.write_text("".join(json.dumps({"input_ids": [i % 50 for i in range(k, k + 16)]}) + "\n" for k in range(2)))
    peaks = {}
    for layers in (2, 2, 8):  # the first run compiles kernels, where nobody has
        model = build("llama", tmp_path / f"m{layers}", num_hidden_layers=layers, **SHAPE)
        options = ("--algorithm", *chain.split(), "--dataset", str(data), "--nsamples", "2", "--seqlen", "16")
        out = str(tmp_path / f"o{layers}")
        peaks[layers] = int(run("quantize", str(model), out, "--offload", "disk", "--overwrite", *options).split()[-1])
    told = run("plan", str(tmp_path / "m8"), "--no-probe", "--json", *options)
    planned = json.loads(told.rpartition("peak")[0])["peak_memory_bytes"]
    assert abs(planned - peaks[8]) < 0.25 * peaks[8], (planned, peaks)
    assert peaks[8] - peaks[2] < 80e6, peaks  # memory is handed out in pieces, some tens of MB more or less
