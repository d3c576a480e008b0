"""How fast one core searches for scales, and how much less the error is than plain rounding's.

    python benchmarks/search.py [SCHEME ...]

Weights are normal, [1024, 4096] in bfloat16, with importances spread over some orders of magnitude; seconds are the
thread's own (what other programs take of the core is left out), the best of three.

AMD EPYC 7003 at 2.45 GHz, one core, 2025-11-21:

TABLE
"""

from __future__ import annotations

import sys
import time

import torch

from roundel.ops.encode import encode
from roundel.ops.search import search
from roundel.scheme import ELEMENTS, Grid, Scheme

NVFP4 = Grid(element=ELEMENTS["e2m1"], block=(1, 16), scale=Grid(element=ELEMENTS["e4m3"], block=(0, 0), scale="F32"))
SCHEMES = [
    *(f"W{bits}A16{group}{zero}" for bits in (2, 3, 4, 8) for group in ("", "_G32") for zero in ("", "_ASYM")),
    *("W4A16_G-1", "MXFP4", "MXFP8", "NVFP4"),
]


def seconds(work: object, times: int = 3) -> float:
    """The least thread time of a function without arguments."""
    assert callable(work)
    found = []
    for _ in range(times):
        start = time.thread_time()
        work()
        found.append(time.thread_time() - start)
    return min(found)


def main(schemes: list[str]) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(1024, 4096, generator=generator)).bfloat16()
    importance = torch.exp(1.5 * torch.randn(4096, generator=generator))
    print(f"{'scheme':14} {'M weights/s':>12} {'plain M/s':>10} {'error / plain':>14} {'by importance':>14}")
    for name in schemes:
        grid = NVFP4 if name == "NVFP4" else Scheme.parse(name).weight
        counted = search(weight[:8], grid, importance)  # compiled here
        searching = seconds(lambda grid=grid: search(weight, grid, importance))
        plain = seconds(lambda grid=grid: encode(weight, grid))
        alike, counted = search(weight, grid), search(weight, grid, importance)
        print(
            f"{name:14} {weight.numel() / searching / 1e6:12.1f} {weight.numel() / plain / 1e6:10.0f} "
            f"{alike.error / alike.baseline:14.3f} {counted.error / counted.baseline:14.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:] or SCHEMES)
