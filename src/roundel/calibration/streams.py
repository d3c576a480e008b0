"""The hidden states of a run over decoder blocks: what enters the unit at hand, what leaves it, in files by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from roundel.calibration.activations import Block, Frontier
from roundel.calibration.skeleton import Skeleton
from roundel.unit import Decodable

__all__ = ["Streams"]


class Streams:
    """Makes frontiers, and moves them on.

    tokens      [samples, tokens] int64
    folder, ending   a frontier's file is FOLDER/UNIT.STREAM + ending, after the unit that it enters
    in_memory   whether states are held, and the files only written; see Frontier
    apart       whether float states travel beside the quantized ones; else these stand for both
    part        samples that are run at once
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokens: Tensor,
        folder: Path,
        ending: str,
        *,
        dtype: torch.dtype,
        in_memory: bool,
        apart: bool,
        part: int,
        device: str,
    ) -> None:
        self.shape = (int(tokens.shape[0]), int(tokens.shape[1]), skeleton.hidden)
        self.part = part
        self._skeleton, self._tokens, self._folder, self._ending = skeleton, tokens, folder, ending
        self._dtype, self._in_memory, self._apart, self._device = dtype, in_memory, apart, device
        self._made: list[Frontier] = []

    def enter(self, first: str, weights: Mapping[str, Tensor]) -> dict[str, Frontier]:
        """The streams in front of the first unit, where both are the same. weights: what the skeleton enters with."""
        made = self.frontier(first, "quantized")
        for samples in self._batches():
            made.write(samples, self._entered(samples, weights))
        made.save()
        return {"quantized": made, "float": made}

    def resume(self, name: str, weights: Mapping[str, Tensor]) -> dict[str, Frontier]:
        """The streams in front of a unit that is not the first, from their files."""
        batches = list(self._batches())
        for samples in batches[:1] + batches[-1:]:  # the arguments that blocks take
            self._entered(samples, weights)
        quantized = self.frontier(name, "quantized")
        quantized.load()
        if not self._apart:
            return {"quantized": quantized, "float": quantized}
        original = self.frontier(name, "float")
        original.load()
        return {"quantized": quantized, "float": original}

    def frontier(self, name: str, stream: str) -> Frontier:
        """Of a stream in front of a unit, to be filled."""
        made = Frontier(self._path(name, stream), self.shape, self._dtype, in_memory=self._in_memory)
        self._made.append(made)
        return made

    def close(self) -> None:
        """Let go of every frontier that was made; files stay."""
        for frontier in self._made:
            frontier.close()

    def states(self, frontier: Frontier) -> Iterator[Tensor]:
        """[at most part, tokens, hidden] on the device, all samples in order."""
        return (frontier.read(samples).to(self._device) for samples in self._batches())

    def advance(
        self, block: Block, weights: Mapping[str, Tensor | Decodable], before: Frontier, behind: Frontier
    ) -> None:
        """Fill `behind` with what the block makes of `before`."""
        with torch.no_grad():
            for samples, states in zip(self._batches(), self.states(before), strict=True):
                behind.write(samples, block.forward(states, weights))

    def _entered(self, samples: range, weights: Mapping[str, Tensor]) -> Tensor:
        return self._skeleton.enter(self._tokens[list(samples)].to(self._device), weights)

    def _path(self, name: str, stream: str) -> Path:
        return self._folder / f"{name}.{stream}{self._ending}"

    def _batches(self) -> Iterator[range]:
        for start in range(0, self.shape[0], self.part):
            yield range(start, min(start + self.part, self.shape[0]))
