"""In which order a matrix' columns are rounded, and which of them share a scale.

Columns whose inputs are large are best rounded first, while all others can still answer their errors (GPTQ's act-order:
by the Hessian's diagonal, descending). Three ways to reconcile that with groups:

- groups of the reordered columns, each column's group stored beside the codes (g_idx);
- groups as they lie in the matrix, with scales fixed before the first column is rounded (static groups);
- groups as they lie in the matrix, taken one after the other, the group with the largest input first, and sorted within
  (group-aware reordering: Gafni et al. 2025, arXiv:2505.14638, section 3.3). Scales are fitted when a group's turn
  comes, and nothing beside the codes is stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Arrangement", "Span", "arrange"]

Span = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """The order of rounding and the groups.

    order         [in] int64: the columns as they are rounded, first to last
    group         [in] int64: the group whose scale each of them takes, in that same order
    spans         (first, end, group) of each group, as places in that order; None where groups are scattered over it
    static        whether scales are fixed before anything is rounded; always where groups are scattered
    group_index   [in] int32: each column's group, where it is not simply column // group size; else None
    """

    order: Tensor
    group: Tensor
    spans: tuple[Span, ...] | None
    static: bool = False
    group_index: Tensor | None = None


def arrange(
    importance: Tensor,
    columns: int,
    *,
    act_order: bool = False,
    static_groups: bool = False,
    group_order: bool = True,
) -> Arrangement:
    """The arrangement of a layer's columns. Ties keep the order of the matrix.

    importance      [in]: the Hessian's diagonal
    columns         of a group; a last group may be short
    act_order       all columns by importance: with g_idx, or, with static_groups, without
    group_order     without act_order: groups by their largest importance, and columns within a group
    """
    width = len(importance)
    places = torch.arange(width, device=importance.device)
    starts = range(0, width, columns)
    if act_order:
        order = _descending(importance)
        if static_groups and len(starts) > 1:
            return Arrangement(order=order, group=order // columns, spans=None, static=True)
        index = torch.empty_like(order)
        index[order] = places // columns
        return Arrangement(
            order=order,
            group=places // columns,
            spans=_spans(range(len(starts)), columns, width),
            static=static_groups,
            group_index=index.to(torch.int32) if len(starts) > 1 else None,
        )
    groups = list(range(len(starts)))
    order = places
    if group_order:
        largest = torch.stack([importance[start : start + columns].max() for start in starts])
        groups = [int(g) for g in _descending(largest)]
        order = torch.cat([places[g * columns :][_descending(importance[g * columns :][:columns])] for g in groups])
    spans = _spans(groups, columns, width)
    return Arrangement(order=order, group=order // columns, spans=spans, static=static_groups)


def _descending(values: Tensor) -> Tensor:
    return values.argsort(descending=True, stable=True)


def _spans(groups: Iterable[int], columns: int, width: int) -> tuple[Span, ...]:
    """Places of groups that come one after the other in this sequence."""
    found, start = [], 0
    for group in groups:
        end = start + min(columns, width - group * columns)
        found.append((start, end, group))
        start = end
    return tuple(found)
