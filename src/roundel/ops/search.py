"""Each block's scale (and zero point) chosen by the squared error of its weights, each weight's with its importance.

Integers: `integer_search`. MX blocks and NVFP4: `float_search`. ggml's block types: `block_tuning`. What is kept is
judged with the scale as stored, in float64, beside plain rounding: no block ends worse. Weights are rounded one by one:
how errors of one could be mended by another (GPTQ) is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from roundel.ops import use_kernels
from roundel.ops.block_tuning import tune_blocks
from roundel.ops.encode import encode, encode_reference
from roundel.ops.float_search import search_floats
from roundel.ops.integer_search import search_integers
from roundel.ops.weighted_error import squared_error
from roundel.scheme import Grid
from roundel.tensor import QuantizedTensor

__all__ = ["Searched", "search", "search_reference"]


@dataclass(frozen=True, kw_only=True)
class Searched:
    """A matrix on its grid, and what choosing came to: sum of importance * (weight - decoded)^2, in float64.

    error      with what was found
    baseline   with plain rounding
    """

    tensor: QuantizedTensor
    error: float
    baseline: float


def search(
    weight: Tensor, grid: Grid, importance: Tensor | None = None, threads: int = 1, reach: float | None = None
) -> Searched:
    """Round a matrix to a grid with the scales (and zero points) of least error.

    weight       [out, in], any float dtype, finite; searched as float32
    grid         what `encode` takes
    importance   [in], at least 0; a block whose importances are all 0 counts its weights alike. None: all alike
    threads      over rows; the result does not depend on it
    reach        as `encode` takes it
    """
    weight = weight.detach()
    if grid.rule == "ggml":
        return _blocks(weight, grid, importance, threads)
    if use_kernels() and weight.device.type == "cpu" and weight.numel():
        from roundel.ops.numba.search import search_tensor

        return search_tensor(weight, grid, importance, threads, reach)
    return search_reference(weight, grid, importance, reach)


def _blocks(weight: Tensor, grid: Grid, importance: Tensor | None, threads: int) -> Searched:
    """ggml's block types: what its own search finds, made better (`block_tuning`); of MXFP4 the exponents."""
    plainly = encode(weight, grid)
    if grid.scale == "E8M0":
        found = search_floats(weight, plainly, importance)
    else:
        found = tune_blocks(weight, grid, importance, threads)
    error, baseline = (squared_error(weight, each, importance) for each in (found, plainly))
    return Searched(tensor=found if error <= baseline else plainly, error=min(error, baseline), baseline=baseline)


def search_reference(
    weight: Tensor, grid: Grid, importance: Tensor | None = None, reach: float | None = None
) -> Searched:
    """`search` in plain torch, on any device."""
    plainly = encode_reference(weight, grid, reach)
    if grid.element.is_integer:
        found = search_integers(weight, plainly, importance)
    else:
        found = search_floats(weight, plainly, importance)
    return Searched(
        tensor=found,
        error=squared_error(weight, found, importance),
        baseline=squared_error(weight, plainly, importance),
    )
