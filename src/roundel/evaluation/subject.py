"""A checkpoint that is measured: its tensors as they are stored, each read when its block is run.

Matrices of packed layers stay codes and scales until the call that multiplies by them (`calibration/late.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from roundel.calibration.block import Block
from roundel.calibration.skeleton import Skeleton
from roundel.checkpoint import Checkpoint, Matrix, open_checkpoint
from roundel.families import text_config
from roundel.formats import Format
from roundel.tensor import ITEMSIZE, QuantizedTensor
from roundel.unit import Decodable, Piece

__all__ = ["Subject", "open_subject"]

CODES = 1.25  # bytes of a packed weight while its block is run: its code, and its share of scales


@dataclass(frozen=True)
class _AsRead:
    """A packed matrix that readers of its format compute in a way of their own. See `Format.decode`."""

    reader: Format
    quantized: QuantizedTensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.quantized.shape

    def decode(self) -> Tensor:
        return self.reader.decode(self.quantized).float()


class Subject:
    """An opened checkpoint, and its model without numbers.

    name         as tables call it
    vocabulary   tokens the model knows: rows of its head
    limit        tokens it takes at once; None where its config does not say
    device       where it is run
    weights      numbers of all blocks and of the end
    nbytes       of all tensors on disk
    """

    def __init__(
        self, checkpoint: Checkpoint, name: str, *, device: str = "cpu", trust_remote_code: bool = False
    ) -> None:
        """Raises PlanError when the model cannot be run block by block, SourceError when a tensor is missing."""
        self.checkpoint, self.name, self.device = checkpoint, name, device
        source = checkpoint.source
        self.skeleton = Skeleton.of(checkpoint, device=device, trust_remote_code=trust_remote_code)
        self.head = f"{self.skeleton.tail.name}.weight"
        self.vocabulary = checkpoint.shape(self.head)[0]
        limit = text_config(source.config).get("max_position_embeddings")
        self.limit = limit if isinstance(limit, int) else None
        pieces = (*self.skeleton.blocks, self.skeleton.tail)
        self.weights = sum(math.prod(checkpoint.shape(name)) for piece in pieces for name in piece.tensors)
        self.nbytes = sum(spec.nbytes for spec in source.tensors.values())

    @property
    def folder(self) -> Path:
        """Where its tokenizer lies."""
        return self.checkpoint.source.small_folder()

    def tensors(self, names: Sequence[str]) -> dict[str, Tensor | Decodable]:
        """Tensors by name, as they are stored; packed matrices as codes. Raises SourceError for one that is broken."""
        return {name: self._tensor(name) for name in names}

    def held_bytes(self, block: Block) -> int:
        """Memory that a block's tensors take while it is run, with the largest of its matrices widened."""
        held, largest = 0.0, 0
        for name in block.tensors:
            weights = math.prod(self.checkpoint.shape(name))
            matrix = self._packed(name)
            held += weights * (CODES if matrix is not None else self._itemsize(name))
            largest = max(largest, weights)
        return int(held) + 4 * largest

    def drop_behind(self, pieces: Sequence[Sequence[str]], done: int) -> None:
        """Let go of shards that no piece after number `done` reads. A shard of a folder stays where it is."""
        source = self.checkpoint.source
        later = {source.shard_of(stored) for names in pieces[done + 1 :] for stored in self._stored(names)}
        now = {source.shard_of(stored) for stored in self._stored(pieces[done])}
        source.drop(sorted(now - later))

    def close(self) -> None:
        self.checkpoint.close()

    def _tensor(self, name: str) -> Tensor | Decodable:
        matrix, reader = self._packed(name), self.checkpoint.reader
        if matrix is None or reader is None:
            return self.checkpoint.tensor(name).to(self.device)
        quantized = self.checkpoint.unpack(matrix.layer()).to(self.device)
        return quantized if type(reader).decode is Format.decode else _AsRead(reader, quantized)

    def _packed(self, name: str) -> Matrix | None:
        """The packed matrix that a tensor's name stands for."""
        matrix = self.checkpoint.wholes.get(name.removesuffix(".weight"))
        is_packed = matrix is not None and name.endswith(".weight") and matrix.stored.scheme is not None
        return matrix if is_packed else None

    def _itemsize(self, name: str) -> int:
        matrix = self.checkpoint.wholes.get(name.removesuffix(".weight"))
        dtype = matrix.dtype if matrix is not None else None
        return ITEMSIZE.get(dtype, 4) if dtype is not None else 4

    def _stored(self, names: Sequence[str]) -> Iterator[str]:
        """The tensors that lie in files behind these names."""
        checkpoint = self.checkpoint
        for name in names:
            module, _, part = name.rpartition(".")
            matrix = checkpoint.wholes.get(module)
            if matrix is None and module == checkpoint.family.head and checkpoint.is_tied:
                matrix = checkpoint.tied_head()
            pieces: Sequence[Piece] = ()
            if matrix is not None and part == "weight":
                pieces = tuple(matrix.stored.parts.values())
            elif matrix is not None and matrix.bias is not None and matrix.bias[0] == name:
                pieces = (matrix.bias[1],)
            yield from (piece.tensor for piece in pieces) if pieces else (name,)


def open_subject(
    model: str | Path,
    work: Path,
    *,
    name: str | None = None,
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Subject:
    """Open a folder or a Hub id. work: where its shards lie while they are needed, if it is the Hub's.

    Raises SourceError when it is broken, unfinished or out of reach; PlanError when it cannot be run block by block.
    """
    checkpoint = open_checkpoint(model, revision, work)
    try:
        return Subject(checkpoint, name or checkpoint.source.name, device=device, trust_remote_code=trust_remote_code)
    except BaseException:
        checkpoint.close()
        raise
