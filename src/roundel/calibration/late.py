"""Matrices that are there only while they are used.

A block computes in float32. What it is given may be narrower: a matrix as the checkpoint stores it, in 16 bits, or one
that is rounded. Widened all at once they would take as much memory as the block in float32; here each is widened by
the call that uses it, and let go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from roundel.ops.decode import decode
from roundel.tensor import QuantizedTensor
from roundel.unit import Decodable

__all__ = ["Late", "stand_ins"]

_VIEWS = (Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]  # of the numbers; other properties know none


class Late(TorchFunctionMode):
    """While it is entered, functions that are called with a stand-in are called with its matrix instead.

    Where nothing is kept for a way back, all matrices of linear layers are widened into the same memory: fresh memory
    takes the system longer to hand out than widening takes.

    matrices   stand-in's id -> matrix
    """

    def __init__(self, matrices: Mapping[int, Tensor | Decodable], dtype: torch.dtype) -> None:
        super().__init__()
        self._matrices, self._dtype = matrices, dtype
        self._room: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is linear and not torch.is_grad_enabled() and not kwargs and id(args[1]) in self._matrices:
            return func(args[0], self._in_room(self._matrices[id(args[1])], args[1]), *map(self._made, args[2:]))
        if func in _VIEWS or getattr(func, "__name__", "") != "__get__":
            args = tuple(self._made(argument) for argument in args)
            kwargs = {name: self._made(argument) for name, argument in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def _in_room(self, matrix: Tensor | Decodable, like: Tensor) -> Tensor:
        if self._room is None:
            largest = max(math.prod(each.shape) for each in self._matrices.values())
            self._room = torch.empty(largest, dtype=self._dtype, device=like.device)
        room = self._room[: like.numel()].view(like.shape)
        if isinstance(matrix, QuantizedTensor) and self._dtype == torch.float32:
            return decode(matrix, room)
        return room.copy_(matrix if isinstance(matrix, Tensor) else matrix.decode())

    def _made(self, argument: Any) -> Any:
        matrix = self._matrices.get(id(argument))
        if matrix is None:
            return argument
        if isinstance(matrix, Tensor):
            return matrix.to(self._dtype)
        return (decode(matrix) if isinstance(matrix, QuantizedTensor) else matrix.decode()).to(self._dtype)


def stand_ins(
    weights: Mapping[str, Tensor | Decodable], dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Tensor], Late]:
    """The weights with everything in their place that is not of this dtype, and what puts it back.

    A stand-in is all NaN and takes no memory, so that what would use it unnoticed shows. Whole numbers stay.
    """
    given: dict[str, Tensor] = {}
    late: dict[int, Tensor | Decodable] = {}
    for name, value in weights.items():
        if isinstance(value, Tensor) and (value.dtype == dtype or not value.is_floating_point()):
            given[name] = value
        else:
            given[name] = torch.full((), torch.nan, dtype=dtype, device=device).expand(value.shape)
            late[id(given[name])] = value
    return given, Late(late, dtype)
