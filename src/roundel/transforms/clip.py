"""Clipping ranges: each group of weights is held within the range that costs its row's output least.

Source: the authors' code of AWQ (arXiv 2306.00978), which the paper mentions in section 4.1. For each row and group,
with X the inputs of the group's columns:

    loss(p) = |X · (Q(clamp(w, p · range)) - w)|^2,   p = 1, 1 - 1/n, 1 - 2/n, ...

where the range is ±max|w| on a symmetric grid, and min(w, 0) .. max(w, 0) on an asymmetric one. Query and key
projections are left out: what they cost shows in the softmax, not in their own output. Unlike scales, clipping changes
the function, if only of weights that are rounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from roundel.scheme import Grid
from roundel.transforms.inputs import Rows
from roundel.transforms.trial import round_trip
from roundel.unit import Layer, Stream, Unit

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["clipped"]

SCORES = re.compile(r"\.(q_\w+|k_\w+|qkv_proj|wq\w*|wk\w*|query\w*|key\w*)$")
AT_ONCE = 1 << 22  # weights searched together


def clipped(unit: Unit, stream: Stream, tokens: int, steps: int, max_shrink: float) -> dict[str, Tensor]:
    """Tensor name -> clipped weight [out, in], for every layer that tokens entered and that is no query or key.

    tokens   how many a range is judged by
    steps    of which those with steps · max_shrink are tried
    """
    kept = {layer.name: Rows(tokens) for layer in unit.layers if not SCORES.search(layer.name)}
    if not kept:
        return {}
    unit.entering().observe(lambda name, x: kept[name].add(x), unit.weights, modules=set(kept), stream=stream)
    shares = [1 - step / steps for step in range(1, int(max_shrink * steps) + 1)]
    return {
        layer.tensor: _clip(unit.weight(layer), layer, kept[layer.name].kept(), shares)
        for layer in unit.layers
        if layer.name in kept and kept[layer.name].seen
    }


def _clip(weight: Tensor, layer: Layer, rows: Tensor, shares: list[float]) -> Tensor:
    """The clipped matrix; rows of it are independent of one another, and searched some at a time."""
    import torch

    grid = layer.scheme.weight
    factor = _factor(rows, grid.block_of(layer.shape)[1])
    at_once = max(1, AT_ONCE // layer.shape[1])
    return torch.cat([_clip_rows(part, grid, factor, shares) for part in torch.split(weight, at_once)])


def _factor(rows: Tensor, columns: int) -> Tensor:
    """[tokens, in] -> [groups, k, columns] with the same inner products of columns, k at most `columns` or tokens."""
    import torch

    from roundel.ops.fit import grouped

    apart = grouped(rows, columns).transpose(0, 1).contiguous()
    return torch.linalg.qr(apart, mode="r").R if apart.shape[1] > columns else apart


def _clip_rows(weight: Tensor, grid: Grid, factor: Tensor, shares: list[float]) -> Tensor:
    import torch

    from roundel.ops.fit import grouped

    columns = factor.shape[2]
    groups = grouped(weight, columns)  # [out, groups, columns]

    def error(candidate: Tensor) -> Tensor:
        """[groups, out]"""
        missed = grouped(round_trip(candidate, grid) - weight, columns).transpose(0, 1)
        return (missed @ factor.mT).square().sum(-1)

    best, share = error(weight), torch.ones(groups.shape[1::-1], dtype=torch.float32, device=weight.device)
    for tried, candidate in _candidates(groups, grid, shares, weight.shape[1]):
        found = error(candidate)
        better = found < best
        best, share = torch.where(better, found, best), torch.where(better, tried, share)
    return _held(groups, grid, share.T[..., None], weight.shape[1])


def _candidates(groups: Tensor, grid: Grid, shares: list[float], width: int) -> Iterator[tuple[float, Tensor]]:
    for share in shares:
        yield share, _held(groups, grid, share, width)


def _held(groups: Tensor, grid: Grid, share: Tensor | float, width: int) -> Tensor:
    """Weights within `share` of their group's range, [out, in]."""
    import torch

    if grid.symmetric:
        highest = groups.abs().amax(-1, keepdim=True)
        lowest = -highest
    else:
        highest, lowest = groups.amax(-1, keepdim=True).clamp(min=0), groups.amin(-1, keepdim=True).clamp(max=0)
    held = torch.minimum(torch.maximum(groups, lowest * share), highest * share)
    return held.flatten(1)[:, :width].contiguous()
