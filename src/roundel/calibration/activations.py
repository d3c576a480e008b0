"""The activations that travel from block to block, and what an algorithm sees of them.

A Frontier holds hidden states [samples, tokens, hidden] of one stream, in memory or in a file. BlockActivations are
the frontier in front of one block together with that block: what `Unit.activations` is.
"""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from roundel.errors import NumericsError, OutputError
from roundel.unit import Call, Decodable, Stream

__all__ = ["Block", "BlockActivations", "Frontier"]


class Block(Protocol):
    """A decoder block, or the model's end, as a function of its weights; weights go by tensor name."""

    @property
    def name(self) -> str:
        """Its module name in the checkpoint."""

    def forward(self, x: Tensor, weights: Mapping[str, Tensor | Decodable]) -> Tensor:
        """The output on x [samples, tokens, hidden]."""

    def observe(
        self,
        x: Tensor,
        weights: Mapping[str, Tensor | Decodable],
        see: Callable[[str, Tensor], None],
        modules: Collection[str],
        every_expert: bool = False,
    ) -> None:
        """Call see(module, inputs [tokens, in]) for what enters these modules."""

    def calls(self, x: Tensor, weights: Mapping[str, Tensor | Decodable], module: str) -> Call:
        """What enters a module."""

    def call(self, call: Call, weights: Mapping[str, Tensor | Decodable]) -> Tensor:
        """A module's output on what entered it, with these weights."""


class Frontier:
    """Hidden states [samples, tokens, hidden] of one stream, stored as float32 or bfloat16.

    path       the file; in memory it is written by `save` only
    in_memory  False: samples go to the file as they are written, and are read from it
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, *, in_memory: bool) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self._sample_bytes = shape[1] * shape[2] * dtype.itemsize
        self._held = torch.empty(shape, dtype=dtype) if in_memory else None
        self._file: int | None = None if in_memory else self._open()

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self._sample_bytes

    def read(self, samples: Sequence[int]) -> Tensor:
        """[len(samples), tokens, hidden] float32."""
        if self._held is not None:
            return self._held[list(samples)].float()
        found = torch.empty((len(samples), *self.shape[1:]), dtype=self.dtype)
        for at, sample in enumerate(samples):
            self._fill(found[at], sample)
        return found.float()

    def write(self, samples: Sequence[int], states: Tensor) -> None:
        """Raises NumericsError for states that are not finite, OutputError when the disk is full."""
        stored = states.detach().to("cpu", self.dtype).contiguous()
        if not bool(torch.isfinite(stored).all()):
            raise NumericsError(
                f"Activations ({self.path.stem}) are not finite. The model overflows on this text, or its checkpoint "
                "is broken. Choose another dataset, or look at the source with `roundel verify`."
            )
        if self._held is not None:
            self._held[list(samples)] = stored
            return
        for at, sample in enumerate(samples):
            self._put(stored[at], sample)

    def save(self) -> None:
        """Make the file whole and safe."""
        if self._held is not None:
            self._file = self._open()
            for sample in range(self.shape[0]):
                self._put(self._held[sample], sample)
        try:
            os.fsync(self._descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._failed(error) from error

    def load(self) -> None:
        """Take the file's content, where it is held in memory. The file must be there and whole."""
        if self._held is not None:
            self._file = self._open()
            for sample in range(self.shape[0]):
                self._fill(self._held[sample], sample)

    def close(self, *, delete: bool = False) -> None:
        """Let go of memory and file; delete the file where it is not needed again."""
        self._held = None
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if delete and self.path.exists():
            os.unlink(self.path)

    @property
    def _descriptor(self) -> int:
        assert self._file is not None
        return self._file

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._failed(error) from error

    def _put(self, states: Tensor, sample: int) -> None:
        view, offset = memoryview(_raw(states)), sample * self._sample_bytes
        try:
            while len(view):
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise self._failed(error) from error

    def _fill(self, states: Tensor, sample: int) -> None:
        view, offset = memoryview(_raw(states)), sample * self._sample_bytes
        while len(view):
            read = os.preadv(self._descriptor, [view], offset)
            if read == 0:
                raise OutputError(f"{self.path} ended early: it was changed during the run. Repeat with --overwrite.")
            view, offset = view[read:], offset + read

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path} cannot be written: {error.strerror}. Activations need {self.nbytes / 1e9:.1f} GB of disk: "
            "free it and repeat the same command to continue, or lower --nsamples."
        )


def _raw(states: Tensor) -> memoryview:
    return memoryview(states.view(torch.uint8).reshape(-1).numpy().data)


@dataclass(frozen=True, kw_only=True)
class BlockActivations:
    """What enters a block, and the block as a function of its weights. See `unit.Activations`.

    own       the unit's tensors by name, for those a caller leaves out
    layers    module names of the unit's layers
    streams   where the hidden states of each stream are; "target" may be missing: then it is computed when asked for
    batch     samples of a step of learning
    part      samples that are run at once where only outputs count
    ticker    called with how far the unit is and a text
    """

    block: Block
    own: Mapping[str, Tensor]
    layers: tuple[str, ...]
    streams: Mapping[str, Frontier]
    samples: int
    tokens: int
    batch: int
    part: int
    device: str
    every_expert: bool
    ticker: Callable[[float, str], None]

    def inputs(self, samples: Sequence[int], stream: Stream = "quantized") -> Tensor:
        if stream == "target" and "target" not in self.streams:
            with torch.no_grad():
                return self.block.forward(self.inputs(samples, "float"), self.own)
        return self.streams[stream].read(samples).to(self.device)

    def forward(self, x: Tensor, weights: Mapping[str, Tensor | Decodable]) -> Tensor:
        return self.block.forward(x, self._all(weights))

    def observe(
        self,
        see: Callable[[str, Tensor], None],
        weights: Mapping[str, Tensor | Decodable],
        *,
        modules: Collection[str] | None = None,
        stream: Stream = "quantized",
        every_expert: bool = False,
    ) -> None:
        whole = self._all(weights)
        for samples in self.batches():
            x = self.inputs(samples, stream)
            self.block.observe(
                x, whole, see, self.layers if modules is None else modules, every_expert or self.every_expert
            )

    def calls(self, module: str, samples: Sequence[int], stream: Stream = "float") -> Call:
        return self.block.calls(self.inputs(samples, stream), self.own, module)

    def call(self, call: Call, weights: Mapping[str, Tensor | Decodable]) -> Tensor:
        return self.block.call(call, self._all(weights))

    def tick(self, done: float, text: str) -> None:
        self.ticker(done, text)

    def batches(self) -> Iterator[range]:
        """All samples in order, `part` at a time."""
        for start in range(0, self.samples, self.part):
            yield range(start, min(start + self.part, self.samples))

    def _all(self, weights: Mapping[str, Tensor | Decodable]) -> Mapping[str, Tensor | Decodable]:
        return ChainMap(dict(weights), dict(self.own))
