"""What a checkpoint is: its format, its schemes, its layers, its sizes. Reads headers only."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from roundel.checkpoint import Checkpoint, Matrix

__all__ = ["Inspected", "Inspection", "inspect_checkpoint"]


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """One matrix: the scheme or the dtype it is stored as, its stored bits per weight, and why it is not rounded (""
    where it is)."""

    name: str
    shape: tuple[int, int]
    stored_as: str
    bits: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The facts, ready to print or to dump as JSON.

    schemes    scheme name -> (layers, weights) of what is quantized
    floats     dtype -> (matrices, weights) of what is not
    kv_cache   how keys and values are rounded in the cache: "fp8", or other words; None: not at all
    nbytes     bytes of all tensors; quantized_bytes of the quantized layers' parts
    """

    name: str
    model_type: str
    family: str
    format: str
    packing: str | None
    kv_cache: str | None
    schemes: dict[str, tuple[int, int]]
    floats: dict[str, tuple[int, int]]
    nbytes: int
    quantized_bytes: int
    shards: int
    matrices: tuple[Inspected, ...]

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per quantized weight; None where nothing is quantized."""
        weights = sum(count for _, count in self.schemes.values())
        return 8 * self.quantized_bytes / weights if weights else None

    def to_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "model_type": self.model_type,
            "family": self.family,
            "format": self.format,
            "packing": self.packing,
            "kv_cache": self.kv_cache,
            "schemes": {k: {"layers": n, "weights": w} for k, (n, w) in self.schemes.items()},
            "floats": {k: {"matrices": n, "weights": w} for k, (n, w) in self.floats.items()},
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "shards": self.shards,
            "matrices": [
                {
                    "name": each.name,
                    "shape": list(each.shape),
                    "scheme": each.stored_as,
                    "bits_per_weight": each.bits,
                    "reason": each.reason,
                }
                for each in self.matrices
            ],
        }


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Facts of an opened checkpoint."""
    matrices = list(checkpoint.matrices.values())
    rounded = [(matrix.stored.scheme.name, matrix) for matrix in matrices if matrix.stored.scheme is not None]
    source = checkpoint.source
    return Inspection(
        name=source.name,
        model_type=str(source.config.get("model_type", "unknown")),
        family=checkpoint.family.name + (" (a guess)" if checkpoint.family.guess else ""),
        format=checkpoint.format_name,
        packing=checkpoint.reader.packing if checkpoint.reader else None,
        kv_cache=checkpoint.reader.cached() if checkpoint.reader else None,
        schemes=_counted(rounded),
        floats=_counted([(matrix.dtype, matrix) for matrix in matrices if matrix.stored.scheme is None]),
        nbytes=sum(s.nbytes for s in source.tensors.values()),
        quantized_bytes=sum(_bytes(checkpoint, matrix) for _, matrix in rounded),
        shards=len({source.shard_of(n) for n in source.tensors}),
        matrices=tuple(_inspected(checkpoint, matrix) for matrix in matrices),
    )


def _counted(named: list[tuple[str, Matrix]]) -> dict[str, tuple[int, int]]:
    """Name -> (matrices, weights) under it."""
    matrices: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for name, matrix in named:
        matrices[name] += 1
        weights[name] += math.prod(matrix.shape)
    return {name: (count, weights[name]) for name, count in matrices.items()}


def _inspected(checkpoint: Checkpoint, matrix: Matrix) -> Inspected:
    scheme = matrix.stored.scheme
    return Inspected(
        name=matrix.name,
        shape=matrix.shape,
        stored_as=matrix.dtype if scheme is None else scheme.name,
        bits=8 * _bytes(checkpoint, matrix) / math.prod(matrix.shape),
        reason=matrix.reason or "" if scheme is None else "",
    )


def _bytes(checkpoint: Checkpoint, matrix: Matrix) -> int:
    """Bytes of a matrix's parts; of a part of a fused tensor, its share."""
    total = 0
    for piece in matrix.stored.parts.values():
        spec = checkpoint.source.tensors[piece.tensor]
        total += math.prod(piece.shape(spec)) * spec.nbytes // max(1, math.prod(spec.shape))
    return total
