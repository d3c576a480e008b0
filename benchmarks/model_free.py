"""Speed and memory of plain rounding, beside auto-round's model-free mode, on the same checkpoints in the same run.

    python benchmarks/model_free.py [--runs 3] [--schemes W4A16,W8A16] [--no-peer]

Makes synthetic Qwen3-0.6B checkpoints of 28 and 112 layers (1.2 and 3.8 GB) under .bench/, runs roundel and
auto-round in turn, and prints wall time, processor time and peak memory, the ratio of the two, the cost of each
further gigabyte, the floor (reading the input and writing as many bytes as the output, with fsync, and nothing else),
the kernel's speed on one core, and what the plan said about memory. auto-round compiles on its first run, which is
shown and not counted. Needs `make peers`, 6 GB of disk and an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

from measuring import BENCH, ROOT, Run, measure

LAYERS = (28, 112)


def roundel(model: Path, scheme: str) -> Run:
    shutil.rmtree(BENCH / "out", ignore_errors=True)
    return measure([sys.executable, "-m", "roundel", "quantize", str(model), str(BENCH / "out"), "--scheme", scheme])


def auto_round(model: Path, scheme: str, peer: Path) -> Run:
    shutil.rmtree(BENCH / "peer", ignore_errors=True)
    program = ROOT / "benchmarks" / "peers" / "auto_round_model_free.py"
    return measure([str(peer), str(program), str(model), str(BENCH / "peer"), scheme])


def floor(model: Path, output_bytes: int) -> float:
    """Seconds to read the checkpoint and write as many bytes as the output has, flushed, and do nothing else."""
    buffer = bytearray(16 << 20)
    target = BENCH / "floor"
    started = time.perf_counter()
    for shard in sorted(model.glob("*.safetensors")):
        with shard.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with target.open("wb", buffering=0) as file:
        for begin in range(0, output_bytes, len(buffer)):
            file.write(memoryview(buffer)[: output_bytes - begin])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def kernel_speed(scheme_name: str) -> float:
    """GB/s of bf16 that the rounding kernel takes on one core, best of twenty. Imports what `measure` must not
    inherit."""
    import numpy as np

    from roundel.ops.numba.rounding import round_integer
    from roundel.ops.numba.stored import BF16
    from roundel.scheme import Scheme

    grid = Scheme.parse(scheme_name).weight
    rows, width = 3072, 1024
    weight = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32) * 0.02
    stored = (weight.view(np.uint32) >> 16).astype(BF16)
    codes, blocks = np.empty((rows, width), np.uint8), grid.blocks((rows, width))
    scales, zeros, best = np.empty(blocks, np.uint16), np.empty(blocks, np.uint8), float("inf")
    for _ in range(20):
        started = time.perf_counter()
        round_integer(stored, grid.element.bits, grid.block[1], grid.symmetric, 0, codes, scales, zeros, np.zeros(2))
        best = min(best, time.perf_counter() - started)
    return stored.nbytes / best / 1e9


def planned_peak(model: Path, scheme: str) -> float:
    """Megabytes of peak memory that the plan foretells."""
    command = [sys.executable, "-m", "roundel", "plan", str(model), "--scheme", scheme, "--json"]
    return (
        int(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["peak_memory_bytes"])
        / 1e6
    )


def size_of(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def best(runs: list[Run]) -> Run:
    return Run(min(r.wall for r in runs), min(r.cpu for r in runs), max(r.peak for r in runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each; the fastest is shown")
    parser.add_argument("--peer-runs", type=int, default=1)
    parser.add_argument("--schemes", default="W4A16,W8A16")
    parser.add_argument("--no-peer", action="store_true")
    arguments = parser.parse_args()
    peer = ROOT / ".peers" / "auto-round" / "bin" / "python"
    with_peer = peer.exists() and not arguments.no_peer
    BENCH.mkdir(exist_ok=True)
    models = [BENCH / f"qwen3-{n}" for n in LAYERS]
    for model, layers in zip(
        models, LAYERS, strict=True
    ):  # in a process of its own: a child inherits its parent's peak
        command = [sys.executable, str(ROOT / "benchmarks" / "synthetic.py"), str(model), "--layers", str(layers)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    sizes = [size_of(m) / 1e9 for m in models]
    print(
        f"{os.cpu_count()} cores, {platform.machine()}, {time.strftime('%Y-%m-%d')}; load before "
        f"{os.getloadavg()[0]:.1f}"
    )
    for scheme in arguments.schemes.split(","):
        roundel(models[0], scheme)  # compiles the kernels once after an install
        cold = auto_round(models[0], scheme, peer) if with_peer else None
        ours, theirs, floors = [], [], []
        for model in models:
            ours.append(best([roundel(model, scheme) for _ in range(arguments.runs)]))
            floors.append(min(floor(model, size_of(BENCH / "out")) for _ in range(arguments.runs)))
            if with_peer:
                theirs.append(best([auto_round(model, scheme, peer) for _ in range(arguments.peer_runs)]))
        print(
            f"\n## {scheme}\n\n| | GB | wall s | processor s | peak MB | floor s |\n| --- | --- | --- | --- | --- "
            f"| --- |"
        )
        for model, run, gigabytes, least in zip(models, ours, sizes, floors, strict=True):
            print(
                f"| roundel, {model.name} | {gigabytes:.2f} | {run.wall:.2f} | {run.cpu:.2f} | {run.peak:.0f} | "
                f"{least:.2f} |"
            )
        for model, run, gigabytes in zip(models, theirs, sizes, strict=False):
            print(f"| auto-round, {model.name} | {gigabytes:.2f} | {run.wall:.2f} | {run.cpu:.2f} | {run.peak:.0f} | |")
        further = (ours[1].wall - ours[0].wall) / (sizes[1] - sizes[0])
        print(f"\nfurther gigabyte: roundel {further:.2f} s", end="")
        if with_peer and cold is not None:
            peer_further = (theirs[1].wall - theirs[0].wall) / (sizes[1] - sizes[0])
            print(f", auto-round {peer_further:.2f} s, ratio {peer_further / further:.1f}")
            print(
                f"end to end: auto-round / roundel = {theirs[0].wall / ours[0].wall:.1f} (its first run, "
                f"compiling: {cold.wall:.0f} s)"
            )
        else:
            print()
        print(
            f"peak memory, 112 layers / 28: {ours[1].peak / ours[0].peak:.3f}; planned "
            f"{planned_peak(models[0], scheme):.0f} MB"
        )
    for scheme in arguments.schemes.split(","):
        print(f"rounding kernel, {scheme}, one core: {kernel_speed(scheme):.2f} GB/s of bf16")


if __name__ == "__main__":
    main()
