"""How large the inputs of layers are: what weighted searches need of them, and no more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from roundel.unit import Inputs, Stream, Unit

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NOT_IN_FILE", "Inputs", "mean_squares"]

NOT_IN_FILE = "the file of importances does not have it"


def mean_squares(unit: Unit, stream: Stream) -> Mapping[str, Inputs]:
    """What enters each layer of the unit that any token reaches, by layer name. One pass over the inputs."""
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def see(name: str, x: Tensor) -> None:
        if x.shape[0] == 0:
            return
        added = x.float().square().sum(0).double()
        sums[name] = sums[name] + added if name in sums else added
        tokens[name] = tokens.get(name, 0) + x.shape[0]

    unit.entering().observe(see, unit.weights, stream=stream)
    return {name: Inputs((total / tokens[name]).float(), tokens[name]) for name, total in sums.items()}
