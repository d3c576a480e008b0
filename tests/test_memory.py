"""Memory is flat in model size, and the plan foretells it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.pico import build
from peaks import SHAPE, run, where_peaks_are_told
from roundel.data.bundled import bundled_model


@where_peaks_are_told
@pytest.mark.parametrize("scheme", ["W4A16", "W8A16"])
def test_four_times_the_layers_take_the_same_memory(scheme: str, tmp_path: Path) -> None:
    peaks, planned = {}, {}
    for layers in (2, 8):
        model = build("llama", tmp_path / f"m{layers}", num_hidden_layers=layers, **SHAPE)
        options = ("--scheme", scheme, "--workers", "2")
        planned[layers] = json.loads(run("plan", str(model), "--json", *options).rpartition("peak")[0])[
            "peak_memory_bytes"
        ]
        run(
            "quantize", str(model), str(tmp_path / "warm"), "--overwrite", *options
        )  # compiles kernels, where nobody has
        peaks[layers] = int(run("quantize", str(model), str(tmp_path / f"o{layers}"), *options).split()[-1])
    assert peaks[8] < 1.1 * peaks[2]
    for layers, peak in peaks.items():
        assert abs(planned[layers] - peak) < 0.25 * peak, (planned, peaks)


@where_peaks_are_told
@pytest.mark.parametrize("mixture", ["q8_0", "f16"])
def test_a_large_embedding_goes_through_in_slabs(mixture: str, tmp_path: Path) -> None:
    """It has 48 million weights, 193 MB in float32."""
    peaks, planned = {}, {}
    for rows in (2048, 2048, 49152):  # the first run compiles kernels, where nobody has
        model = build("llama", tmp_path / f"m{rows}", num_hidden_layers=1, vocab_size=rows, **SHAPE)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(bundled_model() / name, model)
        options = (str(model), "--format", f"gguf:{mixture}", "--workers", "1")
        planned[rows] = json.loads(run("plan", *options, "--json").rpartition("peak")[0])["peak_memory_bytes"]
        out = str(tmp_path / f"o{rows}")
        peaks[rows] = int(run("quantize", options[0], out, "--overwrite", *options[1:]).split()[-1])
    assert peaks[49152] - peaks[2048] < 60e6, peaks  # a slab, and a vocabulary
    for rows, peak in peaks.items():
        assert abs(planned[rows] - peak) < 0.25 * peak, (planned, peaks)


FREED = """
from roundel.memory import give_back

def held():
    return int(open("/proc/self/statm").read().split()[1])

kept = [(bytearray(60000), bytearray(16)) for _ in range(3000)]
ends = [small for _, small in kept]
full = held()
del kept
freed = held()
give_back()
print(full - freed, freed - held())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is a function of glibc's")
def test_what_the_c_library_keeps_is_given_back() -> None:
    """Small pieces that are still used lie between what was freed, so that it is kept until it is asked for."""
    run = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    by_itself, given_back = map(int, run.stdout.split())
    assert given_back > 20_000 > by_itself  # pages of 4096 bytes, of 44,000
