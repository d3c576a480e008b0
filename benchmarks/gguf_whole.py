"""From safetensors to one GGUF file: roundel in one pass, beside llama.cpp's converter followed by its quantizer.

    python benchmarks/gguf_whole.py [--model FOLDER] [--mixture q4_k_m] [--threads 2] [--runs 1]

Without a model, a synthetic Qwen3-0.6B (28 layers, 1.2 GB of bf16) with the bundled model's tokenizer is made under
.bench/. Both use as many threads; the converter has no such option, and writes bf16. Wall time, processor time and peak
memory of each; that every tensor has the same bytes is checked. llama.cpp's source and library stand in
`.peers/llama-cpp` (or `$ROUNDEL_PEERS/llama-cpp`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from measuring import BENCH, ROOT, Run, measure

PEERS = Path(os.environ.get("ROUNDEL_PEERS", ROOT / ".peers"))
PYTHON = PEERS / "llama-cpp" / "bin" / "python"
FOREIGN = ROOT / "tests" / "peers" / "llama_cpp.py"


def model_folder() -> Path:
    folder = BENCH / "qwen3-0.6b-28-gguf"
    if not (folder / "tokenizer.json").exists():
        BENCH.mkdir(exist_ok=True)
        subprocess.run([sys.executable, ROOT / "benchmarks" / "synthetic.py", folder], check=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "src" / "roundel" / "data" / "tinybook" / name, folder / name)
    return folder


def ours(model: Path, mixture: str, threads: int) -> Run:
    out = BENCH / "gguf-ours"
    shutil.rmtree(out, ignore_errors=True)
    wish = ["--format", f"gguf:{mixture}", "--workers", str(threads)]
    return measure([sys.executable, "-m", "roundel", "quantize", str(model), str(out), *wish])


def theirs(model: Path, file_type: int, threads: int) -> tuple[Run, Run]:
    whole, out = BENCH / "whole.gguf", BENCH / "theirs.gguf"
    for path in (whole, out):
        path.unlink(missing_ok=True)
    converted = measure([str(PYTHON), str(FOREIGN), "convert", str(model), str(whole), "bf16"])
    program = ROOT / "benchmarks" / "peers" / "llama_cpp_quantize.py"
    rounded = measure([str(PYTHON), str(program), str(whole), str(out), str(file_type), str(threads)])
    return converted, rounded


def different() -> list[str]:
    """Tensors whose type, shape or bytes are not the same in both files."""
    files = [str(next((BENCH / "gguf-ours").glob("*.gguf"))), str(BENCH / "theirs.gguf")]
    done = subprocess.run([PYTHON, FOREIGN, "see", *files], capture_output=True, text=True, check=True)
    mine, other = (json.loads(done.stdout)[file]["tensors"] for file in files)
    return [name for name in {*mine, *other} if mine.get(name) != other.get(name)]


def told(name: str, run: Run) -> None:
    print(f"{name:34} {run.wall:7.1f} s   {run.cpu:7.1f} s of processor   {run.peak:7.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--mixture", default="q4_k_m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=1)
    arguments = parser.parse_args()
    model = arguments.model or model_folder()
    # Asked in a process of its own: what this one imports, the memory of those it starts would count.
    command = "from roundel.formats.gguf.mixtures import mixture; import sys; print(mixture(sys.argv[1]).file_type)"
    asked = subprocess.run(
        [sys.executable, "-c", command, arguments.mixture], capture_output=True, text=True, check=True
    )
    for _ in range(arguments.runs):
        own = ours(model, arguments.mixture, arguments.threads)
        converted, rounded = theirs(model, int(asked.stdout), arguments.threads)
        both = Run(converted.wall + rounded.wall, converted.cpu + rounded.cpu, max(converted.peak, rounded.peak))
        told("roundel", own)
        told("llama.cpp: converter", converted)
        told("llama.cpp: quantizer", rounded)
        told("llama.cpp: both", both)
        print(f"ratio: {both.wall / own.wall:.1f} wall, {both.cpu / own.cpu:.1f} processor; different: {different()}")


if __name__ == "__main__":
    main()
