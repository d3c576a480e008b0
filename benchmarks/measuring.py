"""What benchmarks measure with: a program run to its end, and the speed that this machine's matrix products reach."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BENCH", "ROOT", "Run", "matmul_peak", "measure"]

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / ".bench"


@dataclass(frozen=True)
class Run:
    """One process: seconds on the clock, seconds of processor, peak resident megabytes (10^6 bytes)."""

    wall: float
    cpu: float
    peak: float


def measure(command: list[str]) -> Run:
    """Run a program and its children to the end. Raises SystemExit with its output when it fails.

    Linux counts what the parent held when it forked; so the caller should be small.
    """
    log = BENCH / "log.txt"
    started = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text(errors='replace')[-3000:]}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)


def matmul_peak() -> float:
    """torch's best product of square matrices in float32, operations a second."""
    import torch

    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best
