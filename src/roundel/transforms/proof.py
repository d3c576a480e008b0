"""Spaces are proven on the real block before they are used: random scales go in, the output must not move.

Scales are powers of two, so that a sound space moves nothing but the last bit (offsets of norms are the exception).
How far an unsound one would move the output differs from block to block, and drowns in a residual stream with large
values; so each movement is compared with that of the same scales put into the readers alone.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from roundel.transforms.absorb import absorb
from roundel.unit import Space, Unit

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["prove"]

TOLERANCE = 1e-3  # of what the scales would move if nothing undid them
FLIPPED = 0.01  # of the tokens, in a mixture of experts: some stand between two experts, and the last bit decides
TOKENS = 256  # of one sample
NOISE = 16  # times the resolution of the block's dtype: what the last bit may come to in an output
_INDEX = re.compile(r"\.\d+\b")


def prove(unit: Unit) -> tuple[Unit, dict[str, str]]:
    """The unit with those of its spaces that hold, and for each other one why it was dropped.

    Spaces that differ only in a number (those of a block's experts) are tried together, and one by one only if they
    fail; so an expert that none of the few tokens reaches is proven by its kind.
    """
    rounded = {layer.name for layer in unit.layers}
    notes: dict[str, str] = {}
    kinds: dict[str, list[Space]] = {}
    for space in unit.spaces:
        if rounded.isdisjoint(space.readers):
            notes[space.name] = "skipped: nothing that reads it is rounded"
        else:
            kinds.setdefault(_INDEX.sub(".0", space.name), []).append(space)
    if kinds:
        trial = _Trial(unit)
        for spaces in kinds.values():
            fault = trial.fault(spaces)
            if fault is not None and len(spaces) > 1:
                notes |= {s.name: f"dropped: {why}" for s in spaces if (why := trial.fault([s])) is not None}
            elif fault is not None:
                notes[spaces[0].name] = f"dropped: {fault}"
    return replace(unit, spaces=tuple(s for s in unit.spaces if s.name not in notes)), notes


class _Trial:
    """The start of one sample through the block, with and without scales."""

    def __init__(self, unit: Unit) -> None:
        import torch

        self.unit = unit
        self.input = unit.entering().inputs([0], "float")[:, :TOKENS]
        self.exact = self._output(unit.weights)
        eps = torch.finfo(self.exact.dtype).eps
        self.tolerance = max(TOLERANCE, NOISE * eps)
        self.noise = NOISE * eps * self.exact.double().norm(dim=-1)
        self.flipped = FLIPPED if any(layer.role == "expert" for layer in unit.layers) else 0.0

    def fault(self, spaces: Sequence[Space]) -> str | None:
        """Why these spaces, scaled together, do not hold; None if they do."""
        import torch

        undone, alone = dict(self.unit.weights), dict(self.unit.weights)
        for space in spaces:
            generator = torch.Generator().manual_seed(zlib.crc32(space.name.encode()))
            powers = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float32)[
                torch.randint(4, (space.size,), generator=generator)
            ]
            scale = torch.exp2(powers).to(self.exact.device)
            undone, alone = absorb(undone, space, scale), absorb(alone, space, scale, writers=False)
        moved, expected = self._moved(undone), float(self._moved(alone).mean())
        if expected <= float(self.noise.mean()):
            return "what it feeds has no effect on the block's output, so it cannot be tested"
        over = moved > self.tolerance * expected + self.noise
        if float(over.double().mean()) <= self.flipped:
            return None
        return (
            f"scaling it moves the block's output by {float(moved.mean()) / expected:.2g} of what scaling its readers "
            "alone does; it is read by something else, or not in proportion"
        )

    def _moved(self, weights: Mapping[str, Tensor]) -> Tensor:
        """How far each token's output is from the exact one [samples, tokens]; infinite where it is not a number."""
        import torch

        moved = (self._output(weights).double() - self.exact.double()).norm(dim=-1)
        return torch.where(torch.isfinite(moved), moved, torch.inf)

    def _output(self, weights: Mapping[str, Tensor]) -> Tensor:
        import torch

        with torch.no_grad():
            return self.unit.entering().forward(self.input, weights)
