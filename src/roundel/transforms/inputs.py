"""What enters the readers of spaces: how large each channel is, and some of the tokens themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from roundel.unit import Space, Stream, Unit

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Entering", "Rows", "columns_to_channels", "enter", "largest_weights"]


class Rows:
    """Tokens kept from a stream of unknown length: every nth, where n doubles as often as `limit` is reached."""

    def __init__(self, limit: int) -> None:
        self.limit, self.step, self.seen = limit, 1, 0
        self._kept: list[Tensor] = []
        self._held = 0

    def add(self, x: Tensor) -> None:
        """x [tokens, in]"""
        first = -self.seen % self.step
        self.seen += x.shape[0]
        if first < x.shape[0]:
            self._kept.append(x[first :: self.step].clone())
            self._held += self._kept[-1].shape[0]
        while self._held > self.limit:
            whole = self.kept()
            self.step *= 2
            self._kept = [whole[::2].clone()]
            self._held = self._kept[0].shape[0]

    def kept(self) -> Tensor:
        """[at most limit, in]; raises nothing, but there must have been a token."""
        import torch

        return torch.cat(self._kept).float()


@dataclass(kw_only=True)
class Entering:
    """What entered a space's readers.

    tokens   how many were seen; one that several readers saw counts once for each
    total    sum of |x| per input column [in]
    peak     largest |x| per input column [in]
    rows     some of the tokens, where they were asked for
    """

    tokens: int = 0
    total: Tensor | None = None
    peak: Tensor | None = None
    rows: Rows | None = None

    def add(self, x: Tensor) -> None:
        """x [tokens, in]"""
        import torch

        if not x.shape[0]:
            return
        sizes = x.abs()
        total, peak = sizes.sum(0, dtype=torch.float64), sizes.amax(0)
        self.tokens += x.shape[0]
        self.total = total if self.total is None else self.total + total
        self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
        if self.rows is not None:
            self.rows.add(x)

    def mean(self) -> Tensor:
        """Mean |x| per input column [in]."""
        assert self.total is not None, "no token was seen"
        return (self.total / self.tokens).float()


def enter(
    unit: Unit, spaces: Sequence[Space], stream: Stream, rows: Callable[[Space], int] = lambda space: 0
) -> dict[str, Entering]:
    """One pass over all inputs: space name -> what entered its readers.

    A space is seen through one reader that all tokens reach (the readers of a norm get the same numbers), or, where
    there are only routed experts, through all of them.

    rows   how many tokens to keep of a space; 0 for none
    """
    experts = {layer.name for layer in unit.layers if layer.role == "expert"}
    found = {s.name: Entering(rows=Rows(limit) if (limit := rows(s)) else None) for s in spaces}
    watched: dict[str, Entering] = {}
    for space in spaces:
        common = [reader for reader in space.readers if reader not in experts]
        for reader in common[:1] or space.readers:
            watched[reader] = found[space.name]
    if watched:
        unit.entering().observe(lambda name, x: watched[name].add(x), unit.weights, modules=set(watched), stream=stream)
    return found


def columns_to_channels(space: Space, values: Tensor, *, largest: bool) -> Tensor:
    """A value per input column of a reader [size * repeat] -> per channel [size]: mean or largest of the repeats."""
    if space.repeat == 1:
        return values
    apart = values.view(-1, space.repeat, space.head)
    return (apart.amax(1) if largest else apart.mean(1)).reshape(-1)


def largest_weights(weights: Mapping[str, Tensor], readers: Sequence[str]) -> Tensor:
    """Largest |w| of each input column over these readers' rows [in]."""
    import torch

    return torch.stack([weights[f"{reader}.weight"].abs().amax(0).float() for reader in readers]).amax(0)
