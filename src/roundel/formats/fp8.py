"""fp8 and modelopt: FP8 with block scales as DeepSeek ships it; NVFP4 and FP8 of NVIDIA's Model Optimizer.

fp8 stores weight e4m3 [out, in] and weight_scale_inv float32 [ceil(out/128), ceil(in/128)], which despite its name the
codes are multiplied by; inputs are rounded at run time, 128 at a time. Written is that; read are other block sizes,
other dtypes of scales, and one scale for each tensor too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from roundel.formats.compressed_config import kv_cache_of
from roundel.formats.floats import (
    block_size,
    decode_blocks,
    find_fp8,
    find_nvfp4,
    fp8_outputs,
    pack_fp8,
    refuse_floats,
    unpack_fp8,
    unpack_nvfp4,
)
from roundel.formats.format import Contents, Format, Found
from roundel.scheme import PRESETS, Scheme
from roundel.tensor import QuantizedTensor, TensorSpec
from roundel.unit import Layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Fp8", "ModelOpt"]

SCALE = "weight_scale_inv"
BLOCK = PRESETS["FP8_BLOCK"]


@dataclass(frozen=True)
class Fp8(Format):
    """FP8 with one scale for each block of 128 x 128."""

    name: ClassVar[str] = "fp8"
    summary: ClassVar[str] = "FP8 with block scales, as DeepSeek ships it: transformers, vLLM, SGLang"
    rounds_inputs: ClassVar[bool] = True
    quantization: Mapping[str, object] = field(default_factory=dict)

    def refuse(self, layer: Layer) -> str | None:
        if layer.scheme.weight.block != BLOCK.weight.block or layer.scheme.input != BLOCK.input:
            return f"fp8 stores FP8_BLOCK only, {layer.scheme.name} is another scheme"
        return refuse_floats(layer, self.name)

    def grid_of(self, scheme: Scheme) -> Scheme:
        return replace(scheme, weight=replace(scheme.weight, scale="F32")) if scheme == BLOCK else scheme

    def outputs(self, layer: Layer) -> tuple[TensorSpec, ...]:
        return fp8_outputs(layer, SCALE)

    def pack(self, layer: Layer, weight: QuantizedTensor) -> dict[str, Tensor]:
        return pack_fp8(layer, weight, SCALE)

    def unpack(self, layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
        return unpack_fp8(layer, stored)

    def decode(self, weight: QuantizedTensor) -> Tensor:
        return decode_blocks(weight)

    def config(self, contents: Contents) -> dict[str, object]:
        modules = dict.fromkeys((*contents.kept, contents.head))  # a tied head is a module too, without tensors
        rounded = {layer.name for layer in contents.layers}
        kept = [m for m in modules if m not in rounded and m != contents.embedding]
        return {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": kept or None,
            "provider": "roundel",
            "quant_method": "fp8",
            "weight_block_size": list(BLOCK.weight.block),
        }

    def caveats(self, contents: Contents) -> tuple[str, ...]:
        if any(size % 128 for layer in contents.layers for size in layer.shape):
            return ("fp8: on CPU transformers decodes layers wrong whose sizes are no multiples of 128",)
        return ()

    def recognize(self, quantization: Mapping[str, object]) -> Format | None:
        return Fp8(quantization=quantization) if quantization.get("quant_method") == "fp8" else None

    def find(self, module: str, parts: Mapping[str, TensorSpec]) -> Found | None:
        found = find_fp8(module, parts, block_size(self.quantization.get("weight_block_size")))
        if found is None or found.scheme.weight.block != BLOCK.weight.block:
            return found
        return replace(found, scheme=replace(BLOCK, weight=found.scheme.weight))


@dataclass(frozen=True)
class ModelOpt(Format):
    """NVFP4 and FP8 as NVIDIA's Model Optimizer writes them. Only read."""

    name: ClassVar[str] = "modelopt"
    summary: ClassVar[str] = "NVFP4 and FP8 of NVIDIA Model Optimizer, read only"
    writes: ClassVar[bool] = False
    quantization: Mapping[str, object] = field(default_factory=dict)

    def unpack(self, layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
        assert layer.stored.scheme is not None
        return unpack_nvfp4(layer, stored) if layer.stored.scheme.bits == 4 else unpack_fp8(layer, stored)

    def recognize(self, quantization: Mapping[str, object]) -> Format | None:
        return ModelOpt(quantization=quantization) if quantization.get("quant_method") == "modelopt" else None

    def cached(self) -> str | None:
        return kv_cache_of(self.quantization)

    def find(self, module: str, parts: Mapping[str, TensorSpec]) -> Found | None:
        return find_nvfp4(module, parts) or find_fp8(module, parts, BLOCK.weight.block)
