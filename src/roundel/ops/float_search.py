"""The scales of blocks of floats: a few beside the fitted one are tried, and the one of least error is taken.

MX blocks try the neighbouring exponents, NVFP4 blocks all scales from half to one and a half times the fitted one. The
exponents are those of auto-round's optimized RTN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from roundel.ops.encode import encode_scaled
from roundel.ops.weighted_error import block_errors
from roundel.tensor import QuantizedTensor

__all__ = ["chosen_scales", "float_scales", "rows_of", "search_floats"]


def float_scales(plainly: QuantizedTensor) -> list[Tensor | QuantizedTensor]:
    """Scales to try for blocks of floats, as they are stored, each [out, groups]; plain rounding's first.

    E8M0: one exponent more, then one to three fewer. e4m3: all codes from half to one and a half times the fitted one.
    """
    scale = plainly.scale
    if isinstance(scale, QuantizedTensor):
        fitted = scale.codes.view(torch.uint8).int()
        near = sorted((c for c in range(-9, 7) if c), key=abs)
        codes = [(fitted + change).clamp(1, 126).to(torch.uint8).view(torch.float8_e4m3fn) for change in near]
        return [scale, *(replace(scale, codes=each) for each in codes)]
    exponents = scale.view(torch.uint8).int()
    tried = [(exponents + change).clamp(0, 254).to(torch.uint8) for change in (1, -1, -2, -3)]
    return [scale, *(each.view(torch.float8_e8m0fnu) for each in tried)]


def chosen_scales(tried: Sequence[Tensor | QuantizedTensor], index: Tensor) -> Tensor | QuantizedTensor:
    """Of scales that were tried, for each block the one at `index` [out, groups]."""
    codes = [each.codes if isinstance(each, QuantizedTensor) else each for each in tried]
    stacked = torch.stack([each.view(torch.uint8) for each in codes])
    taken = stacked.gather(0, index.long()[None])[0].view(codes[0].dtype)
    first = tried[0]
    return replace(first, codes=taken) if isinstance(first, QuantizedTensor) else taken


def rows_of(scale: Tensor | QuantizedTensor, rows: slice) -> Tensor | QuantizedTensor:
    """The scales of some rows of a matrix."""
    return replace(scale, codes=scale.codes[rows]) if isinstance(scale, QuantizedTensor) else scale[rows]


def search_floats(weight: Tensor, plainly: QuantizedTensor, importance: Tensor | None) -> QuantizedTensor:
    """The matrix under the best of `float_scales` for each block. See `search.search`."""
    tried = float_scales(plainly)
    errors = [
        torch.cat(list(block_errors(weight, encode_scaled(weight, plainly.grid, scale), importance))) for scale in tried
    ]
    return encode_scaled(weight, plainly.grid, chosen_scales(tried, torch.stack(errors).argmin(0)))
