"""Memory is flat in model size, and the plan foretells it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.pico import build
from roundel.data.bundled import bundled_model

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
PROGRAM = """
import sys
from roundel.cli.main import cli
cli(sys.argv[1:], standalone_mode=False)
status = open("/proc/self/status").read()
print("peak", int(status.partition("VmHWM:")[2].split()[0]) * 1024)
"""


def run(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, which is Linux's")
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, which is Linux's")
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, which is Linux's")
def test_measuring_four_times_the_layers_takes_the_same_memory(tmp_path: Path) -> None:
    text, peaks = tmp_path / "ids.jsonl", {}
    text.write_text(json.dumps({"input_ids": [n % 251 for n in range(1024)]}))
    for layers in (4, 16):
        model = build("llama", tmp_path / f"m{layers}", num_hidden_layers=layers, **SHAPE)
        run("quantize", str(model), str(tmp_path / f"o{layers}"), "--workers", "2")
        options = ("--ppl", str(text), "--window", "128", "--kl-against", str(model))
        run("eval", str(tmp_path / f"o{layers}"), *options)  # compiles kernels, where nobody has
        peaks[layers] = int(run("eval", str(tmp_path / f"o{layers}"), *options).split()[-1])
    assert peaks[16] < 1.1 * peaks[4], peaks


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, which is Linux's")
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
