"""mxfp4: the experts of GPT-OSS as its checkpoints store them. Only read.

gate_up_proj_blocks uint8 [experts, out, in / 32, 16], the even column in the low nibble; gate_up_proj_scales uint8
[experts, out, in / 32] (E8M0). The family says which rows are the gate's and which the up projection's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from roundel.formats.format import Format, Found
from roundel.formats.mxfp import unpack_nibbles
from roundel.scheme import PRESETS
from roundel.tensor import QuantizedTensor, TensorSpec
from roundel.unit import Layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Mxfp4Blocks"]


@dataclass(frozen=True)
class Mxfp4Blocks(Format):
    """MXFP4 blocks of fused experts."""

    name: ClassVar[str] = "mxfp4"
    summary: ClassVar[str] = "MXFP4 experts of GPT-OSS, read only"
    writes: ClassVar[bool] = False

    def unpack(self, layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
        import torch

        codes = unpack_nibbles(stored["blocks"].flatten(1))
        return QuantizedTensor(
            grid=PRESETS["MXFP4"].weight, codes=codes, scale=stored["scales"].view(torch.float8_e8m0fnu)
        )

    def recognize(self, quantization: Mapping[str, object]) -> Format | None:
        return self if quantization.get("quant_method") == "mxfp4" else None

    def find(self, module: str, parts: Mapping[str, TensorSpec]) -> Found | None:
        blocks, scales = parts.get("blocks"), parts.get("scales")
        if blocks is None or scales is None or (blocks.dtype, scales.dtype) != ("U8", "U8"):
            return None
        if len(blocks.shape) != 3 or blocks.shape[2] != 16 or scales.shape != blocks.shape[:2]:
            return None
        out, groups, half = blocks.shape
        return Found(shape=(out, groups * half * 2), scheme=PRESETS["MXFP4"], parts=("blocks", "scales"))
