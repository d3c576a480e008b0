"""What is in memory together: Piece (a part of a stored tensor), Layer (one linear weight), Unit (a group of them)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from roundel.scheme import Scheme
from roundel.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Layer", "Piece", "Stored", "Unit"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor of the checkpoint, or the part of it that one layer needs.

    tensor       its name in the checkpoint
    index        leading indices taken first: (3,) is expert 3 of a fused [experts, out, in] tensor
    start, stop, step   then rows start:stop:step of what is left; stop None means to the end
    transposed   whether the part is stored [in, out] and is turned after reading, before rows are taken
    """

    tensor: str
    index: tuple[int, ...] = ()
    start: int = 0
    stop: int | None = None
    step: int = 1
    transposed: bool = False

    @property
    def is_whole(self) -> bool:
        return self.index == () and (self.start, self.stop, self.step) == (0, None, 1) and not self.transposed

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """The part's shape, given the whole tensor's spec."""
        shape = spec.shape[len(self.index) :]
        if self.transposed:
            shape = (*reversed(shape[:2]), *shape[2:])
        if not shape:
            return shape
        return (len(range(*slice(self.start, self.stop, self.step).indices(shape[0]))), *shape[1:])


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How a layer lies in the checkpoint it is read from.

    format   the name of the Format that unpacks it, or "plain" for a float matrix
    scheme   the grid it is on there; None for "plain"
    parts    part name as the format calls it ("weight", "weight_scale_inv", "qweight") -> where it is
    """

    format: str = "plain"
    scheme: Scheme | None = None
    parts: Mapping[str, Piece] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One linear weight [out, in].

    name     its module path in the written checkpoint ("model.layers.0.mlp.experts.3.up_proj")
    shape    (out, in)
    dtype    the source's dtype of the float weight ("BF16"); for a packed source what it decodes to
    scheme   the grid it is to be on
    stored   how it lies in the source
    bias     the bias tensor's name in the checkpoint, if the layer has one
    role     "expert" for a routed expert's matrix, "head" for the output head, else "linear"
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    scheme: Scheme
    stored: Stored
    bias: str | None = None
    role: str = "linear"

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The smallest group of weights that must be in memory together.

    weights   float matrices [out, in] by layer name, one for each of `layers`
    """

    layers: tuple[Layer, ...]
    weights: Mapping[str, Tensor]
