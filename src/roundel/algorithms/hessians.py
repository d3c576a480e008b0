"""Hessians of a unit's layers, collected while its inputs run through it.

Layers that are handed the same tensor (q, k and v; gate and up; all experts that are shown all tokens) share one
Hessian, which is then computed and factored once. That they share is seen, not known from names, and may end: then the
common Hessian becomes two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Collector", "Hessian", "stages"]


@dataclass
class Hessian:
    """What entered some layers so far.

    total    [in, in] float32: the sum of x^T x, complete on and above the diagonal
    tokens   how many rows x had
    fourth   the sum of |x|^4
    layers   whose it is
    """

    total: Tensor
    tokens: int
    fourth: float
    layers: set[str]


class Collector:
    """What `Activations.observe` tells, and the Hessians made of it.

    budget   bytes of Hessians that may be held; one is held in any case
    left     layers for which there was no room
    inputs   layer -> number of the tensor it was first handed, in the order of calls
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.hessians: list[Hessian] = []
        self.left: set[str] = set()
        self.inputs: dict[str, int] = {}
        self._home: dict[str, Hessian] = {}
        self._x: Tensor | None = None
        self._seeing: set[str] = set()
        self._number = 0

    def see(self, name: str, x: Tensor) -> None:
        """x [tokens, in] enters a layer. It is added when another tensor comes, and must not be changed until then."""
        if self._x is None or not _is_same(self._x, x) or name in self._seeing:
            self._add()
            self._x = x
            self._number += 1
        self.inputs.setdefault(name, self._number)
        self._seeing.add(name)

    def finish(self) -> Iterator[Hessian]:
        """The Hessians, whole and divided by their tokens: means over tokens. What was handed over is not held."""
        from roundel.ops.hessian import mirror

        self._add()
        self._home.clear()
        while self.hessians:
            hessian = self.hessians.pop(0)
            mirror(hessian.total)
            hessian.total /= max(1, hessian.tokens)
            yield hessian

    def _add(self) -> None:
        """Add the last tensor to the Hessian, or Hessians, of the layers that saw it."""
        x, seeing = self._x, self._seeing - self.left
        self._x, self._seeing = None, set()
        if x is None or x.shape[0] == 0:
            return
        new = {name for name in seeing if name not in self._home}
        homes = {id(self._home[name]): self._home[name] for name in seeing - new}
        for home in homes.values():
            if not home.layers <= seeing:  # some of them are handed something else from here on
                apart = home.layers & seeing
                home.layers -= apart
                home = self._hold(replace(home, total=home.total.clone(), layers=apart))
            _add_outer(home, x)
        if new and self._has_room(x.shape[1]):
            total = x.new_zeros((x.shape[1], x.shape[1])).float()
            _add_outer(self._hold(Hessian(total=total, tokens=0, fourth=0.0, layers=new)), x)
        else:
            self.left |= new

    def _hold(self, hessian: Hessian) -> Hessian:
        self.hessians.append(hessian)
        self._home |= dict.fromkeys(hessian.layers, hessian)
        return hessian

    def _has_room(self, width: int) -> bool:
        held = sum(4 * h.total.numel() for h in self.hessians)
        return not self.hessians or held + 4 * width * width <= self.budget


def _add_outer(hessian: Hessian, x: Tensor) -> None:
    from roundel.ops.hessian import add_outer

    add_outer(hessian.total, x)
    hessian.tokens += x.shape[0]
    hessian.fourth += float(x.float().square().sum(1).double().square().sum())


def _is_same(left: Tensor, right: Tensor) -> bool:
    return (left.data_ptr(), left.shape, left.stride(), left.dtype) == (
        right.data_ptr(),
        right.shape,
        right.stride(),
        right.dtype,
    )


def stages(inputs: Mapping[str, int]) -> list[list[str]]:
    """Layers that may be rounded together, in the order they run: those that share an input, and those whose names
    differ in a number only (the same matrix of every expert).

    inputs   layer -> number of the tensor it was handed, in the order of calls
    """
    found: dict[int | str, list[str]] = {}  # what a layer may share with others -> its stage
    for name, number in inputs.items():
        keys = (number, _unnumbered(name))
        merged: list[str] = []
        for stage in {id(found[key]): found[key] for key in keys if key in found}.values():
            merged += stage
        merged.append(name)
        found |= dict.fromkeys((*keys, *(k for n in merged for k in (inputs[n], _unnumbered(n)))), merged)
    return list({id(stage): stage for stage in found.values()}.values())


def _unnumbered(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
