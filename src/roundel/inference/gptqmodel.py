"""GPTQModel's kernels for graphics cards: a layer in its words, in its linear classes, for the backends that call them.

Words are those of GPTQ version 2 (`formats/words.py`), which GPTQModel 7.7 takes from files too; its classes then
repack them for their kernels, which they build when they are first used. What they refuse is refused here beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from roundel.errors import BackendError
from roundel.formats.format import WordLayout
from roundel.formats.words import pack_words
from roundel.inference.gradient import Kernel
from roundel.inference.grouping import side_by_side
from roundel.tensor import QuantizedTensor
from roundel.unit import Layer

__all__ = ["GROUPS", "Foreign", "filled", "refuse_foreign", "word_parts"]

GROUPS = (32, 64, 128)
WORDS = WordLayout(order="gptq", group_index=True)


def refuse_foreign(layer: Layer, device: str, bits: Sequence[int]) -> str | None:
    """Why a class of these widths cannot hold a layer, or None."""
    grid, (_, width) = layer.scheme.weight, layer.shape
    if device != "cuda":
        return f"it runs on cuda, not on {device}"
    if not grid.is_integer_in_groups:
        return f"it multiplies integers in groups, {layer.scheme.name} is none"
    if grid.element.bits not in bits:
        return f"it multiplies {' or '.join(map(str, bits))} bits, not {grid.element.bits}"
    if grid.scale != "F16":
        return "it takes float16 scales"
    columns = grid.block_of(layer.shape)[1]
    if columns != width and (columns not in GROUPS or width % columns):
        return f"it takes whole groups of {', '.join(map(str, GROUPS))} or of all columns, not {width} in {columns}"
    return None


def word_parts(quantized: QuantizedTensor, backend: str) -> tuple[dict[str, Tensor], Tensor | None]:
    """qweight, qzeros, scales and g_idx as GPTQModel's own packer makes them, of columns side by side; and by which
    order columns of inputs are taken, or None."""
    codes, order = side_by_side(quantized, backend)
    plain = QuantizedTensor(grid=quantized.grid, codes=codes, scale=quantized.scale, zero=quantized.zero)
    return pack_words(plain, WORDS), order


def filled(linear: Any, layer: Layer, parts: dict[str, Tensor]) -> Any:
    """A linear class of GPTQModel with these numbers in it, not yet repacked for its kernels."""
    grid, (out, width) = layer.scheme.weight, layer.shape
    made = linear(
        bits=grid.element.bits,
        group_size=-1 if grid.block_of(layer.shape)[1] == width else grid.block[1],
        desc_act=False,
        sym=grid.symmetric,
        in_features=width,
        out_features=out,
        bias=False,
        pack_dtype=torch.int32,
    )
    for name, part in parts.items():
        held = getattr(made, name)
        if held.shape != part.shape:
            raise BackendError(
                f"GPTQModel's {type(made).__name__} has a {name} {list(held.shape)} where {list(part.shape)} was made. "
                "Install gptqmodel 7.7."
            )
        if name in made._buffers:
            made._buffers[name] = part
        else:
            setattr(made, name, nn.Parameter(part, requires_grad=False))
    made.qzero_format(format=2)
    return made


class Foreign(Kernel):
    """A weight in a class of GPTQModel, which multiplies in float16 or bfloat16: float32 is rounded to the latter."""

    def __init__(
        self, quantized: QuantizedTensor, backend: str, build: Callable[[dict[str, Tensor]], nn.Module]
    ) -> None:
        """build: the parts -> the class, ready to multiply. Raises BackendError when GPTQModel cannot do that here."""
        super().__init__()
        self.shape = quantized.shape
        parts, order = word_parts(quantized, backend)
        try:
            self.inner = build(parts)
        except (ValueError, NotImplementedError, ImportError, RuntimeError) as error:
            raise BackendError(f"GPTQModel's {backend} does not run here ({error}). Choose another backend.") from error
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, in] -> [tokens, out]"""
        entering = x.detach()
        if self.order is not None:
            entering = entering[:, self.get_buffer("order")]
        if entering.dtype == torch.float32:
            entering = entering.to(torch.bfloat16)
        found: Tensor = self.inner(entering)
        return found.to(x.dtype)
