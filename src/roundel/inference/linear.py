"""Modules in the places of a model's own: rounded layers, and kept matrices that stay in the 16 bits they come in.

On a CPU everything between matrices is computed in float32, while a kept matrix (the embedding, the head, a router)
would double in size if it were widened; so it is widened as it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from roundel.errors import BackendError
from roundel.inference.gradient import Kernel, product
from roundel.inference.numba.layout import FEW

__all__ = ["Anchor", "QuantEmbedding", "QuantLinear", "StoredEmbedding", "StoredLinear", "unsaved"]

WIDENED = 1 << 22  # weights widened at a time


class Anchor(nn.Module):
    """Keeps a model where its rounded layers are: its first module, which refuses before another one has moved.

    It has the first parameter too, for the dtype of that is what transformers calls a model's.
    """

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.computed = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
        self.device = torch.device(device).type

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Anchor:
        there = fn(torch.empty(0, device=self.device)).device.type
        if there != self.device:
            raise BackendError(
                f"The model was loaded for {self.device} and cannot be moved to {there}: its rounded layers lie as "
                f"{self.device} wants them. Load the checkpoint again with device={there!r}."
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class QuantLinear(nn.Module):
    """y = x @ weight.T + bias, the weight packed as its backend likes it.

    name      the layer's name in the checkpoint; backend: the backend's name; device: where it was made to run
    kernel    what the backend made
    """

    def __init__(self, name: str, backend: str, device: str, kernel: Kernel, shape: tuple[int, int]) -> None:
        super().__init__()
        self.name, self.backend, self.device = name, backend, torch.device(device).type
        self.out_features, self.in_features = shape
        self.kernel = kernel
        self.bias: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in x's dtype."""
        if x.device.type != self.device:
            raise BackendError(
                f"{self.name} was loaded for {self.device} by backend {self.backend}, and its input lies on "
                f"{x.device.type}. Load the checkpoint again with device={x.device.type!r}."
            )
        flat = x.reshape(-1, self.in_features)
        y = product(flat, self.kernel, self.kernel.back)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        there = fn(torch.empty(0, device=self.device)).device.type
        if there != self.device:
            raise BackendError(
                f"{self.name} was loaded for {self.device} by backend {self.backend} and cannot be moved to {there}: "
                f"its weights lie as {self.device} wants them. Load the checkpoint again with device={there!r}."
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        raise unsaved()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, backend={self.backend}"


class StoredLinear(nn.Module):
    """A kept matrix [out, in] of 16 bits under inputs of 32: widened as it is used, by a kernel where there are few."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.bias: nn.Parameter | None = None
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in x's dtype."""
        y = product(x.reshape(-1, self.in_features), self._multiplied, self._back)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _multiplied(self, x: Tensor) -> Tensor:
        flat = x.detach()
        if len(flat) <= FEW and flat.dtype == torch.float32 and flat.device.type == "cpu":
            from roundel.inference.numba.few import multiply_floats

            return multiply_floats(self.weight.detach(), flat)
        y = torch.empty((len(flat), self.out_features), dtype=x.dtype, device=x.device)
        for rows, weights in self._slabs(x.dtype):
            y[:, rows] = flat @ weights.T
        return y

    def _back(self, gradient: Tensor) -> Tensor:
        found = gradient.new_zeros((len(gradient), self.in_features))
        for rows, weights in self._slabs(gradient.dtype):
            found += gradient[:, rows] @ weights
        return found

    def _slabs(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Some rows after others, and their weights [rows, in]."""
        step = max(1, WIDENED // self.in_features)
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            yield rows, self.weight[rows].detach().to(dtype)


class StoredEmbedding(nn.Module):
    """A model's embedding, its matrix as it is stored, what it gives in another dtype.

    The model's own module is called on the rows that are needed, for it may do more than look them up.
    """

    def __init__(self, embedding: nn.Embedding, weight: nn.Parameter, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.dtype = weight, dtype
        self.num_embeddings = len(weight)
        self.inner = _emptied(embedding)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> [..., hidden]"""
        return _looked_up(self.inner, self.weight.detach()[ids.reshape(-1)].to(self.dtype), ids)


class QuantEmbedding(nn.Module):
    """A model's embedding whose matrix is rounded: rows are decoded as they are looked up.

    kernel   the packed matrix
    rows     row numbers [n] -> these rows of it [n, hidden]
    """

    def __init__(
        self, embedding: nn.Embedding, kernel: Kernel, rows: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.kernel, self.rows, self.dtype, self.num_embeddings = kernel, rows, dtype, embedding.num_embeddings
        self.inner = _emptied(embedding)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> [..., hidden]"""
        return _looked_up(self.inner, self.rows(ids.reshape(-1)).to(self.dtype), ids)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        raise unsaved()


def unsaved() -> BackendError:
    """What is said to who wants to save a rounded model, or its tensors."""
    return BackendError(
        "A rounded model cannot be saved from where it runs: its weights lie as their backends want them. Copy the "
        "folder that it was loaded from."
    )


def _emptied(embedding: nn.Embedding) -> nn.Embedding:
    """The model's own module without numbers: it is given rows with each call."""
    embedding.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    embedding.padding_idx = None  # rows get other numbers, and without gradients it means nothing
    return embedding


def _looked_up(embedding: nn.Embedding, rows: Tensor, ids: Tensor) -> Tensor:
    places = torch.arange(len(rows), device=ids.device).view(ids.shape)
    found: Tensor = functional_call(embedding, {"weight": rows}, (places,))
    return found
