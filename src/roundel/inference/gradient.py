"""Gradients through matrices that autograd does not see: they reach inputs, for the matrices themselves are rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Kernel", "product"]

TOGETHER = 256  # columns of a weight that are found at once

Product = Callable[[Tensor], Tensor]


class Kernel(nn.Module):
    """A weight [out, in]: x [tokens, in] -> x @ weight.T [tokens, out], in x's dtype."""

    shape: tuple[int, int]

    def back(self, gradient: Tensor) -> Tensor:
        """gradient [tokens, out] -> gradient @ weight [tokens, in]. Here by products that give the weight's columns."""
        width = self.shape[1]
        found, entering = gradient.new_empty((len(gradient), width)), gradient.float()
        for start in range(0, width, TOGETHER):
            ones = torch.eye(min(TOGETHER, width - start), device=gradient.device)
            columns = self(nn.functional.pad(ones, (start, width - start - len(ones))))
            found[:, start : start + len(ones)] = entering @ columns.T
        return found


def product(x: Tensor, forward: Product, back: Product) -> Tensor:
    """forward(x), and back(gradient) where autograd wants the gradient of x."""
    if x.requires_grad and torch.is_grad_enabled():
        found: Tensor = _Product.apply(x, forward, back)  # type: ignore[no-untyped-call]
        return found
    return forward(x)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, forward: Product, back: Product) -> Tensor:
        return forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.back = inputs[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradient), None, None
