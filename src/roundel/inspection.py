"""What a checkpoint is: its format, its schemes, its layers, its sizes. Reads headers only."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from roundel.checkpoint import Checkpoint, Matrix

__all__ = ["Inspection", "inspect_checkpoint"]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The facts, ready to print or to dump as JSON.

    schemes    scheme name -> (layers, weights) of what is quantized
    floats     dtype -> (matrices, weights) of what is not
    nbytes     bytes of all tensors; quantized_bytes of the quantized layers' parts
    """

    name: str
    model_type: str
    family: str
    format: str
    packing: str | None
    schemes: dict[str, tuple[int, int]]
    floats: dict[str, tuple[int, int]]
    nbytes: int
    quantized_bytes: int
    shards: int
    rows: tuple[tuple[str, tuple[int, int], str, float, str], ...]

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
            "schemes": {k: {"layers": n, "weights": w} for k, (n, w) in self.schemes.items()},
            "floats": {k: {"matrices": n, "weights": w} for k, (n, w) in self.floats.items()},
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "shards": self.shards,
            "matrices": [
                {"name": name, "shape": list(shape), "scheme": scheme, "bits_per_weight": bits, "reason": reason}
                for name, shape, scheme, bits, reason in self.rows
            ],
        }


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Facts of an opened checkpoint."""
    schemes: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    floats: Counter[str] = Counter()
    float_weights: Counter[str] = Counter()
    rows, quantized_bytes = [], 0
    for matrix in checkpoint.matrices.values():
        count = matrix.shape[0] * matrix.shape[1]
        if matrix.stored.scheme is None:
            floats[matrix.dtype] += 1
            float_weights[matrix.dtype] += count
            rows.append(
                (matrix.name, matrix.shape, matrix.dtype, _bytes(checkpoint, matrix) * 8 / count, matrix.reason or "")
            )
            continue
        nbytes = _bytes(checkpoint, matrix)
        quantized_bytes += nbytes
        schemes[matrix.stored.scheme.name] += 1
        weights[matrix.stored.scheme.name] += count
        rows.append((matrix.name, matrix.shape, matrix.stored.scheme.name, nbytes * 8 / count, ""))
    packing = getattr(checkpoint.reader, "packing", None)
    source = checkpoint.source
    return Inspection(
        name=source.name,
        model_type=str(source.config.get("model_type", "unknown")),
        family=checkpoint.family.name + (" (a guess)" if checkpoint.family.guess else ""),
        format=checkpoint.reader.name if checkpoint.reader else "plain",
        packing=packing,
        schemes={k: (schemes[k], weights[k]) for k in schemes},
        floats={k: (floats[k], float_weights[k]) for k in floats},
        nbytes=sum(s.nbytes for s in source.tensors.values()),
        quantized_bytes=quantized_bytes,
        shards=len({source.shard_of(n) for n in source.tensors}),
        rows=tuple(rows),
    )


def _bytes(checkpoint: Checkpoint, matrix: Matrix) -> int:
    """Bytes of a matrix's parts; of a part of a fused tensor, its share."""
    total = 0
    for piece in matrix.stored.parts.values():
        spec = checkpoint.source.tensors[piece.tensor]
        elements = 1
        for length in piece.shape(spec):
            elements *= length
        total += elements * spec.nbytes // max(1, _elements(spec.shape))
    return total


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
