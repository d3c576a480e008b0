"""A matrix between float and file: is it finite, what has it in common with others, what did rounding cost, which bytes
is it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from roundel.checkpoint import Checkpoint
from roundel.errors import ConversionError, NumericsError
from roundel.families.stacked import stacked_with
from roundel.fusion import SLAB_BYTES, Errors, not_finite
from roundel.scheme import Grid
from roundel.tensor import ITEMSIZE, TensorSpec
from roundel.unit import Layer, Piece

if TYPE_CHECKING:
    from torch import Tensor

    from roundel.algorithms import Rounded
    from roundel.tensor import QuantizedTensor

__all__ = [
    "Demoted", "as_bytes", "check_scales", "errors_in", "errors_in_floats", "errors_of", "finite", "holds", "largest",
    "reaches", "sharing", "slabs", "sound",
]  # fmt: skip

COMPARED = 1 << 22  # weights decoded at a time
SURELY_FITS = 32752.0  # half of float16's largest: weights up to it are spread over a range whose scale is finite


class Demoted(NumericsError):
    """Layers that cannot be rounded, by name. The plan must be made anew with them kept."""

    def __init__(self, layers: Mapping[str, NumericsError]) -> None:
        self.layers = layers
        more = (
            f" ({len(layers) - 1} more layers have such weights: {', '.join(list(layers)[1:6])})"
            if len(layers) > 1
            else ""
        )
        super().__init__(str(next(iter(layers.values()))) + more)


def finite(layer: Layer, weight: Tensor, start: int = 0) -> Tensor:
    """The weight itself, or its rows from `start` on. Raises NumericsError for the first value that is not finite."""
    from roundel.ops.losses import first_not_finite

    bad = first_not_finite(weight)
    if bad is not None:
        raise not_finite(layer, start + bad[0], bad[1], float(weight[bad]))
    return weight


def sharing(layer: Layer, layers: Mapping[str, Layer]) -> tuple[Layer, ...]:
    """Those of other layers, by name, that have one scale for the whole matrix in common with a layer: runtimes stack
    them (`families.stacked`) and they are on the same grid. None of them where the grid has no such scale."""
    scale = layer.scheme.weight.scale
    if not isinstance(scale, Grid) or scale.block != (0, 0):
        return ()
    near = (layers.get(name) for name in stacked_with(layer.name) if name != layer.name)
    return tuple(each for each in near if each is not None and each.scheme.weight == layer.scheme.weight)


def reaches(layers: Iterable[Layer], weights: Mapping[str, Tensor]) -> dict[str, float]:
    """`Unit.reach` of layers that are in memory together."""
    by_name = {layer.name: layer for layer in layers}
    shared = {name: (layer, *others) for name, layer in by_name.items() if (others := sharing(layer, by_name))}
    own = {each.name: largest(weights[each.tensor]) for together in shared.values() for each in together}
    return {name: max(own[each.name] for each in together) for name, together in shared.items()}


def largest(weight: Tensor) -> float:
    """The largest magnitude among finite weights; 0 where there are none."""
    import torch

    magnitudes = weight.abs()
    return float(torch.where(magnitudes.isfinite(), magnitudes, 0.0).max()) if weight.numel() else 0.0


def sound(layer: Layer, weight: Tensor, rounded: Rounded, *, strict: bool, start: int = 0) -> Rounded:
    """The result itself, of a weight or of its rows from `start` on. Raises NumericsError when a scale left float16,
    naming the largest weight, and when `strict` forbids the fallback that was taken."""
    import torch

    from roundel.tensor import plain

    if not bool(torch.isfinite(plain(rounded.tensor.scale)).all()):
        row, column = divmod(int(weight.abs().argmax()), layer.shape[1])
        raise not_finite(layer, start + row, column, float(weight[row, column]))
    if strict and rounded.fallback is not None:
        raise NumericsError(
            f"{layer.name}: {rounded.fallback}. --strict makes an error of that. Calibrate with more text "
            "(--nsamples), leave the layer as it is (--ignore-layers), or take the fallback without --strict."
        )
    return rounded


def check_scales(layer: Layer, weight: Tensor) -> None:
    """Raises NumericsError for finite weights whose scales leave float16 when they are rounded plainly."""
    from roundel.algorithms import Rounded
    from roundel.ops.encode import encode

    if largest(weight) > SURELY_FITS:
        sound(layer, weight, Rounded(tensor=encode(weight, layer.scheme.weight)), strict=False)


def errors_of(weight: Tensor, decoded: Tensor) -> Errors:
    """What a matrix lost, in float64 sums. decoded: what readers of the (first) format make of it."""
    from roundel.ops.losses import squares

    return Errors(*squares(weight, decoded))


def errors_in(weight: Tensor, rounded: QuantizedTensor, decode: Callable[[QuantizedTensor], Tensor]) -> Errors:
    """`errors_of` what was rounded; `decode` is asked for some rows at a time where that can be."""
    if not rounded.has_rows:
        return errors_of(weight, decode(rounded))
    lost = Errors(0.0, 0.0)
    rows = max(1, COMPARED // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        lost = lost.plus(errors_of(weight[part], decode(rounded.rows(part))))
    return lost


def holds(dtype: str, other: str) -> bool:
    """Whether one dtype of floats holds all numbers of another."""
    return dtype == other or dtype == "F64" or (dtype == "F32" and other in ("F16", "BF16"))


def errors_in_floats(spec: TensorSpec, rows: Tensor, dtype: str, format: str) -> Errors:
    """What rows of a tensor lose in another dtype. Raises ConversionError for a number beyond its end."""
    from roundel.tensor import torch_dtype

    values = rows.float().reshape(1, -1)
    stored = values.to(torch_dtype(dtype)).float()
    beyond = stored.isinf() & values.isfinite()
    if bool(beyond.any()):
        raise ConversionError(
            f"{spec.name} {list(spec.shape)} holds {float(values[beyond][0]):.9g}, beyond the end of {dtype}, in which "
            f"{format} would store it. Choose one with the exponents of float32: gguf:bf16 or gguf:f32."
        )
    return errors_of(values, stored)


def slabs(checkpoint: Checkpoint, piece: Piece, together: int = 1) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of a part of a tensor, a slab at a time: whole runs of `together` rows. All of it at once where
    its rows do not stand one after the other."""
    spec = checkpoint.source.tensors[piece.tensor]
    shape = piece.shape(spec)
    if not piece.in_rows or not shape or not math.prod(shape):
        yield 0, checkpoint.read_piece(piece)
        return
    step = max(1, SLAB_BYTES // (math.prod(shape[1:]) * ITEMSIZE[spec.dtype]) // together) * together
    for start in range(0, shape[0], step):
        yield start, checkpoint.read_slab(piece, start, min(start + step, shape[0]))


def as_bytes(tensor: Tensor, dtype: str | None = None) -> memoryview:
    """A tensor's bytes, in another dtype where one is given."""
    import torch

    from roundel.tensor import torch_dtype

    found = tensor.to("cpu", torch_dtype(dtype) if dtype else tensor.dtype).contiguous().reshape(-1)
    return found.view(torch.uint8).numpy().data
