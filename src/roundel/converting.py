"""A quantized layer on its way from one format to another: moved where its numbers fit, else refused or rounded anew.

Exact means that readers of both files compute the same float32 weights, bit for bit; it is checked on every layer, with
what the two formats say that their readers compute.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from roundel.algorithms import Algorithm, Rounded
from roundel.errors import ConversionError
from roundel.formats import Format
from roundel.holding import as_fitted
from roundel.matrices import finite, largest
from roundel.regrid import regrid
from roundel.tensor import QuantizedTensor, TensorSpec, torch_dtype
from roundel.unit import Layer, Unit

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Beside", "convert_layer", "inexact"]


@dataclass(frozen=True)
class Beside:
    """A layer, as it lies in the source, and what readers of that compute."""

    layer: Layer
    stored: QuantizedTensor
    weight: Tensor


def convert_layer(
    layer: Layer,
    stored: QuantizedTensor,
    weight: Tensor,
    format: Format,
    algorithm: Algorithm | None,
    beside: Iterable[Beside] = (),
) -> Rounded:
    """The layer on its scheme's grid.

    stored      as it lies in the source; weight: what readers of the source compute of it, float32
    algorithm   what rounds a layer whose numbers do not fit; with None that raises ConversionError
    beside      those with which it shares a scale where it is rounded, read as they are asked for. It is rounded where
                one of these has to be, so that they do share it
    Raises NumericsError for weights that are not finite.
    """
    finite(layer, weight)
    moved, reason = _moved(layer, stored, weight, format)
    if reason is not None and algorithm is None:
        raise inexact(layer, reason, format)
    if moved is not None and algorithm is None:
        return Rounded(tensor=moved)
    reach = 0.0
    for other in beside:
        reach = max(reach, largest(other.weight))
        if reason is None and _moved(other.layer, other.stored, other.weight, format)[0] is None:
            reason, moved = f"{other.layer.name}, with which it shares a scale, cannot move", None
    if moved is not None:
        return Rounded(tensor=moved, fallback=reason)
    assert algorithm is not None
    fitted = replace(layer, scheme=as_fitted(layer.scheme))
    shared = {layer.name: reach} if reach else {}
    unit = Unit(name=layer.name, layers=(fitted,), weights={layer.tensor: weight}, reach=shared)
    rounded = algorithm.quantize(unit)[layer.name]
    tensor, grid = rounded.tensor, layer.scheme.weight
    if fitted.scheme != layer.scheme and not isinstance(tensor.scale, QuantizedTensor):
        assert isinstance(grid.scale, str)
        tensor = replace(tensor, grid=grid, scale=tensor.scale.to(torch_dtype(grid.scale)))
    if stored.input_scale is not None and layer.scheme.stores_input_scale:
        tensor = replace(tensor, input_scale=stored.input_scale)  # inputs are the same: `choosing` asks for that
    return replace(rounded, tensor=tensor, fallback=f"rounded anew: {reason}")


def _moved(
    layer: Layer, stored: QuantizedTensor, weight: Tensor, format: Format
) -> tuple[QuantizedTensor | None, str | None]:
    """Codes, scales and zero points on the asked grid, None where it does not hold them; and why readers do not
    compute the same, None where they do."""
    import torch

    assert layer.stored.scheme is not None
    if not layer.moves:
        return None, f"{format.name} has no grid for {layer.stored.scheme.name}"
    moved = regrid(stored, layer.scheme.weight)
    if isinstance(moved, str):
        return None, moved
    if moved.group_index is not None and not layer.permuted:
        return None, "columns of its groups do not lie side by side"
    decoded = format.decode(moved)
    if torch.equal(decoded, weight):
        return moved, None
    row, column = (int(i) for i in (decoded != weight).nonzero()[0])
    old, new = float(weight[row, column]), float(decoded[row, column])
    return moved, f"weight [{row}, {column}] is {old:.9g}, and readers of {format.name} would compute {new:.9g}"


def inexact(tensor: Layer | TensorSpec, reason: str, format: Format) -> ConversionError:
    """The error of a layer, or of another tensor, whose numbers a format does not hold."""
    return ConversionError(
        f"{tensor.name} {list(tensor.shape)} does not go into {format.name} as it is: {reason}. Choose another format, "
        "or pass --requantize to round what it decodes to anew."
    )
