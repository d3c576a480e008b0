"""A diagonal map put into the weights around a space: writers divided by it, readers' columns multiplied.

    y = W · norm(x) = (W · diag(s)) · (norm(x) / s)

Nothing but rounding changes. Source: the equivalent transformation of SmoothQuant (arXiv 2211.10438, equation 3), which
AWQ (arXiv 2306.00978, section 3.2) and TEQ (arXiv 2310.10944, section 3) share; norms that scale by 1 + weight keep
their offset: weight' = (1 + weight) / s - 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from roundel.unit import Space, Writer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["absorb", "rows_of", "storable"]


def absorb(weights: Mapping[str, Tensor], space: Space, scale: Tensor, *, writers: bool = True) -> dict[str, Tensor]:
    """The weights with a space's channels rescaled; every other tensor is the one that was given.

    weights   by tensor name, as `Unit.weights`
    scale     [size], positive; gradients flow into it
    writers   False: multiply the readers only, which changes the function (to see how much it would)
    """
    found = dict(weights)
    if writers:
        for writer in space.writers:
            found[writer.tensor] = _divided(found[writer.tensor], writer, scale)
    columns = space.columns(scale)
    for reader in space.readers:
        found[f"{reader}.weight"] = found[f"{reader}.weight"] * columns
    return found


def storable(weights: Mapping[str, Tensor], space: Space, scale: Tensor) -> Tensor:
    """The nearest scale whose divided norm fits the norm's own dtype, so that writing it to a file costs nothing.

    A norm's numbers stay in 16 bits. Divided by just any scale they would be rounded on the way to the file, by up to
    0.4%, and readers, multiplied by the exact scale, would not make up for it. Where all stored numbers fit bfloat16
    (or float16) they are taken for such; a space that a matrix writes is left as it is: matrices are rounded anyway.

    scale, result   [size]
    """
    import torch

    writer = space.writers[0]
    stored = weights[writer.tensor]
    if stored.ndim != 1:
        return scale
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(stored.to(dtype).to(stored.dtype), stored):
            effective = stored + writer.offset
            divided = (effective / scale - writer.offset).to(dtype).to(stored.dtype) + writer.offset
            found = effective / divided
            usable = torch.isfinite(found) & (found > scale / 2) & (found < scale * 2)  # not where a norm is 0
            return torch.where(usable, found, scale)
    return scale


def rows_of(tensor: Tensor, writer: Writer, size: int) -> Tensor:
    """The rows of a writer's tensor that write channel 0, 1, ...: [size]."""
    import torch

    run = writer.run or size
    starts = torch.arange(0, size // run, device=tensor.device) * writer.step + writer.start
    return (starts[:, None] + torch.arange(run, device=tensor.device)).flatten()


def _divided(tensor: Tensor, writer: Writer, scale: Tensor) -> Tensor:
    size = scale.shape[0]
    factor = scale
    if tensor.shape[0] != size:
        rows = rows_of(tensor, writer, size)
        factor = scale.new_ones(tensor.shape[0]).index_copy(0, rows, scale)
    factor = factor.view(-1, *(1 for _ in tensor.shape[1:]))
    return (tensor + writer.offset) / factor - writer.offset if writer.offset else tensor / factor
