"""`ops.search` by kernels, a slab of rows at a time: `integer_search` and `float_search`.

In general the error of a matrix agrees with the definition's within 1e-6 of itself and 1e-7 of the weights' own square.
What is stored is judged in float64 here as there. One core of an EPYC 7003 at 2.45 GHz searches, in millions of weights
a second (benchmarks/search.py): W4G128 symmetric 34, asymmetric 24; W2G32 symmetric 24, asymmetric 14; MXFP4 34.

Threads take rows. They are not numba's own: its pool cannot be entered by several workers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from roundel.ops.encode import encode, encode_scaled
from roundel.ops.float_search import chosen_scales, float_scales, rows_of
from roundel.ops.integer_search import ladder
from roundel.ops.numba.float_search import search_floats
from roundel.ops.numba.integer_search import search_integer
from roundel.ops.search import Searched
from roundel.scheme import Grid
from roundel.tensor import QuantizedTensor, plain

__all__ = ["search_tensor"]

SLAB = 1 << 18  # weights that a thread holds as float32


def search_tensor(
    weight: Tensor, grid: Grid, importance: Tensor | None, threads: int = 1, reach: float | None = None
) -> Searched:
    """`ops.search.search` by kernel, for weights on the CPU."""
    plainly = encode(weight, grid, reach)
    width = weight.shape[1]
    counted = np.ones(width, np.float32) if importance is None else importance.float().contiguous().numpy()
    rows = max(1, SLAB // width)
    slabs = [slice(start, start + rows) for start in range(0, weight.shape[0], rows)]
    work, result = (_integers if grid.element.is_integer else _floats)(weight, plainly, counted)
    if threads > 1 and len(slabs) > 1:
        with ThreadPoolExecutor(threads, thread_name_prefix="search") as pool:
            sums = list(pool.map(work, slabs))
    else:
        sums = [work(slab) for slab in slabs]
    error, baseline = (sum(float(pair[i]) for pair in sums) for i in (0, 1))
    return Searched(tensor=result(), error=error, baseline=baseline)


Work = Callable[[slice], np.ndarray]
Result = Callable[[], QuantizedTensor]


def _rows(weight: Tensor, slab: slice) -> np.ndarray:
    found: np.ndarray = weight[slab].float().contiguous().numpy()
    return found


def _integers(weight: Tensor, plainly: QuantizedTensor, counted: np.ndarray) -> tuple[Work, Result]:
    """What is done to a slab of rows, and what it comes to in the end: plain rounding's arrays are improved in
    place."""
    grid, group = plainly.grid, plainly.grid.block_of(plainly.shape)[1]
    rungs = ladder(grid.element.bits)
    codes, scales = plainly.codes.numpy().view(np.uint8), plain(plainly.scale).numpy()
    zero = plainly.zero
    zeros = np.zeros(scales.shape, np.uint8) if zero is None else zero.numpy()

    def work(slab: slice) -> np.ndarray:
        sums = np.zeros(2)
        fixed = (grid.element.bits, grid.symmetric, grid.lowest_zero, rungs.count, rungs.widest, rungs.finest)
        rows = _rows(weight, slab)
        search_integer(rows, counted, group, *fixed, codes[slab], scales[slab], zeros[slab], sums)
        return sums

    def result() -> QuantizedTensor:
        return QuantizedTensor(grid=grid, codes=plainly.codes, scale=torch.from_numpy(scales).half(), zero=zero)

    return work, result


def _floats(weight: Tensor, plainly: QuantizedTensor, counted: np.ndarray) -> tuple[Work, Result]:
    grid, group = plainly.grid, plainly.grid.block_of(plainly.shape)[1]
    tried = float_scales(plainly)
    steps = np.stack([plain(each).numpy() for each in tried])
    index = np.zeros(steps.shape[1:], np.uint8)
    codes = plainly.codes
    mantissa, smallest = (1, 1.0) if grid.element.name == "e2m1" else (3, 2.0**-6)
    bounds = np.uint32(mantissa << 23), np.float32(smallest).view(np.uint32), np.float32(grid.element.hi)

    def work(slab: slice) -> np.ndarray:
        sums, here = np.zeros(2), np.ascontiguousarray(steps[:, slab])
        search_floats(_rows(weight, slab), counted, group, *bounds, here, index[slab], sums)
        chosen = chosen_scales([rows_of(each, slab) for each in tried], torch.from_numpy(index[slab]))
        codes[slab] = encode_scaled(weight[slab], grid, chosen).codes
        return sums

    def result() -> QuantizedTensor:
        return QuantizedTensor(grid=grid, codes=codes, scale=chosen_scales(tried, torch.from_numpy(index)))

    return work, result
