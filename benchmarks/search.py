"""How fast one core searches for scales (opt-rtn) and solves for them (hqq), and how much less the error is than plain
rounding's.

    python benchmarks/search.py [SCHEME ...]

Weights are normal, [1024, 4096] in bfloat16, with importances spread over some orders of magnitude; seconds are the
thread's own (what other programs take of the core is left out), the best of three. docs/benchmarks.md keeps a run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from roundel.ops.encode import encode
from roundel.ops.half_quadratic import Splitting, solve
from roundel.ops.search import Searched, search
from roundel.scheme import ELEMENTS, Grid, Scheme

NVFP4 = Grid(element=ELEMENTS["e2m1"], block=(1, 16), scale=Grid(element=ELEMENTS["e4m3"], block=(0, 0), scale="F32"))
SCHEMES = [
    *(f"W{bits}A16{group}{zero}" for bits in (2, 3, 4, 8) for group in ("", "_G32") for zero in ("", "_ASYM")),
    *("W4A16_G-1", "MXFP4", "MXFP8", "NVFP4"),
]


def seconds(work: Callable[[], object], times: int = 3) -> float:
    """The least thread time of a function."""
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
    print("                millions of weights/s        error / plain rounding's")
    print("scheme          plain  opt-rtn    hqq    opt-rtn  by importance  hqq (its norm)")
    for name in schemes:
        grid = NVFP4 if name == "NVFP4" else Scheme.parse(name).weight

        def searched(grid: Grid = grid) -> Searched:
            return search(weight, grid, importance)

        def solved(grid: Grid = grid) -> Searched:
            return solve(weight, grid, Splitting())

        works: list[Callable[[], object]] = [lambda grid=grid: encode(weight, grid), searched]  # type: ignore[misc]
        alike, counted = search(weight, grid), searched()  # compiled here
        errors = f"{alike.error / alike.baseline:10.3f} {counted.error / counted.baseline:14.3f}"
        if grid.element.is_integer:
            halved = solved()
            works.append(solved)
            errors += f" {halved.error / halved.baseline:15.3f}"
        speeds = [f"{weight.numel() / seconds(work) / 1e6:8.1f}" for work in works]
        print(f"{name:12} {' '.join(speeds):26} {errors}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or SCHEMES)
