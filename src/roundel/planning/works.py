"""A source cut into pieces of work: every tensor in one of them, in the order they lie in the files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Literal

from roundel.checkpoint import Checkpoint, Matrix
from roundel.matrices import sharing
from roundel.planning.plan import Copy, Work
from roundel.tensor import TensorSpec
from roundel.unit import Layer, Piece

__all__ = ["tensors_of", "works_of"]


def works_of(
    checkpoint: Checkpoint,
    matrices: Mapping[str, Matrix],
    layers: Mapping[str, Layer],
    splits: bool,
    left: Collection[str],
) -> tuple[Work, ...]:
    """Every tensor of the source exactly once (a tied head reads the embedding's again, and parts of a matrix read all
    of it), in the order they lie in the files.

    splits   whether fused tensors are taken apart although no part of them is rounded
    left     loose tensors that are not written
    """
    source = checkpoint.source
    split = {p.tensor for m in matrices.values() if m.name in layers and m.is_split for p in m.stored.parts.values()}
    works: list[Work] = []
    whole: dict[str, None] = {}  # fused tensors of which no part is rounded, copied once
    for matrix in matrices.values():
        layer = layers.get(matrix.name)
        tensors = [p.tensor for p in matrix.stored.parts.values()]
        fused = matrix.is_split and not splits and not split.intersection(tensors)
        if layer is None and fused and matrix.stored.format == "plain":
            whole.update(dict.fromkeys(tensors + ([matrix.bias[1].tensor] if matrix.bias else [])))
            continue
        copies = (_copy(source.tensors, *matrix.bias),) if matrix.bias else ()
        if layer is not None:
            works.append(_work(checkpoint, matrix.name, "round", layer, copies, sharing(layer, layers)))
        elif matrix.stored.format != "plain" or matrix.stored.cut is not None:
            works.append(_work(checkpoint, matrix.name, "decode", matrix.layer(), copies))
        else:
            weight = _copy(source.tensors, matrix.name + ".weight", matrix.stored.parts["weight"])
            works.append(_work(checkpoint, matrix.name + ".weight", "copy", None, (weight, *copies)))
    for name in (*whole, *(name for name in checkpoint.loose if name not in left)):
        works.append(_work(checkpoint, name, "copy", None, (_copy(source.tensors, name, Piece(tensor=name)),)))
    order = {name: i for i, name in enumerate(source.tensors)}
    return tuple(sorted(works, key=lambda w: min(order[t] for t in tensors_of(w))))


def _copy(tensors: Mapping[str, TensorSpec], name: str, piece: Piece) -> Copy:
    spec = tensors[piece.tensor]
    return Copy(spec=TensorSpec(name, spec.dtype, piece.shape(spec)), piece=piece)


def _work(
    checkpoint: Checkpoint,
    name: str,
    kind: Literal["round", "decode", "copy"],
    layer: Layer | None,
    copies: tuple[Copy, ...],
    beside: tuple[Layer, ...] = (),
) -> Work:
    work = Work(name=name, kind=kind, layer=layer, copies=copies, beside=beside)
    read = (*tensors_of(work), *(piece.tensor for each in beside for piece in each.stored.parts.values()))
    return replace(work, shards=tuple(dict.fromkeys(checkpoint.source.shard_of(tensor) for tensor in read)))


def tensors_of(work: Work) -> list[str]:
    """The tensors of the source that a piece of work writes on."""
    layers = (*work.layers, *work.decodes, *((work.layer,) if work.layer else ()))
    return [p.tensor for layer in layers for p in layer.stored.parts.values()] + [c.piece.tensor for c in work.copies]
