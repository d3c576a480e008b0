"""Whether a checkpoint fits into the memory of where it is to run: known from its headers, before a weight is read."""

from __future__ import annotations

import math

import torch

from roundel.checkpoint import Checkpoint, Matrix
from roundel.errors import BackendError
from roundel.memory import free_memory
from roundel.tensor import FLOAT_DTYPES, ITEMSIZE

__all__ = ["check_room", "needed_bytes"]


def needed_bytes(checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> int:
    """Bytes that a loaded model takes at least on its device, and on a CPU those of the largest layer while it is
    unpacked. Activations and the cache of keys and values come on top."""
    total, largest = 0, 0
    for matrix in checkpoint.wholes.values():
        total += _stays(matrix, device, dtype)
        if matrix.stored.format != "plain":
            largest = max(largest, 3 * math.prod(matrix.shape))  # codes, unsigned codes, and what they are read from
    specs = checkpoint.source.tensors
    total += sum(specs[n].nbytes for n in checkpoint.loose)
    return total + (largest if device == "cpu" else 0)


def check_room(checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> None:
    """Raises BackendError when the model does not fit."""
    needed = needed_bytes(checkpoint, device, dtype)
    free = free_memory(device)
    if needed > free:
        raise BackendError(
            f"{checkpoint.source.name} needs {needed / 1e9:.1f} GB on {device} and {free / 1e9:.1f} GB are free. Close "
            "other programs, load it elsewhere, or round it to fewer bits."
        )


def _stays(matrix: Matrix, device: str, dtype: torch.dtype) -> int:
    weights = math.prod(matrix.shape)
    if matrix.stored.scheme is not None:
        return int(weights * matrix.stored.scheme.weight.bits_per_weight(matrix.shape) / 8)
    stored = ITEMSIZE[matrix.dtype] if matrix.dtype in FLOAT_DTYPES else dtype.itemsize
    return weights * (min(stored, dtype.itemsize) if device == "cpu" else dtype.itemsize)
