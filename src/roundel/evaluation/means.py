"""Means over positions with their standard errors, the window being what is drawn.

Positions of one window depend on each other, so windows are the sample: for sums s and counts c of windows, the mean is
sum(s) / sum(c), its squared error n / (n - 1) * sum((s - mean * c)^2) / sum(c)^2 (the ratio estimator of cluster
sampling). A difference of two models over the same windows is the mean of differences: what both find hard cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Mean", "influences", "mean_of", "percentile_of", "standard_error"]


@dataclass(frozen=True)
class Mean:
    """A number and its standard error; None where there is one window only."""

    value: float
    error: float | None

    def exp(self) -> Mean:
        """Of e to this power: its error is e^value times this one's."""
        value = math.exp(self.value) if self.value < 700.0 else math.inf
        return Mean(value, None if self.error is None else value * self.error)

    def times(self, factor: float) -> Mean:
        return Mean(self.value * factor, None if self.error is None else self.error * abs(factor))

    def to_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "standard_error": self.error}


def mean_of(windows: Sequence[Tensor]) -> Mean:
    """Of a number at each position, [positions] of each window."""
    sums = torch.stack([window.sum(dtype=torch.float64) for window in windows])
    counts = torch.tensor([len(window) for window in windows], dtype=torch.float64)
    value = float(sums.sum() / counts.sum())
    return Mean(value, standard_error(influences(sums, counts)) if math.isfinite(value) else None)


def influences(sums: Tensor, counts: Tensor) -> Tensor:
    """By what each window moves sum(sums) / sum(counts), [windows] float64; 0 in sum."""
    return (sums - sums.sum() / counts.sum() * counts) / counts.sum()


def standard_error(moved: Tensor) -> float | None:
    """Of what windows move by `moved` [windows]; None where there is one window only."""
    count = len(moved)
    return math.sqrt(float(moved.square().sum()) * count / (count - 1)) if count > 1 else None


def percentile_of(windows: Sequence[Tensor], share: float) -> Mean:
    """The smallest number that at least this share of all positions does not exceed.

    Its error is half the distance between the order statistics one standard deviation of their rank away, as if
    positions were independent; None where that reaches past the largest.
    """
    ordered = torch.cat(list(windows)).sort().values
    count = len(ordered)
    rank = math.ceil(share * count)
    away = math.sqrt(count * share * (1 - share))
    low, high = math.floor(rank - away), math.ceil(rank + away)
    value = float(ordered[rank - 1])
    if low < 1 or high > count:
        return Mean(value, None)
    return Mean(value, float(ordered[high - 1] - ordered[low - 1]) / 2)
