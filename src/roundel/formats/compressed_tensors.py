"""llm_compressor: compressed-tensors checkpoints, as vLLM and transformers read them.

Written: `mxfp4-pack-quantized` and `mxfp8-quantized` (and `mixed-precision` of both). Read as well: FP8 by tensor,
channel and block (`float-quantized`), and NVFP4 (`nvfp4-pack-quantized`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from roundel.errors import SourceError
from roundel.formats.floats import decode_fp8, find_fp8, find_nvfp4, unpack_fp8, unpack_nvfp4
from roundel.formats.format import Contents, Format, Found
from roundel.formats.mxfp import find_mx, mx_outputs, pack_mx, refuse_mx, unpack_mx
from roundel.scheme import Scheme
from roundel.tensor import QuantizedTensor, TensorSpec
from roundel.unit import Layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CompressedTensors", "Fp8", "ModelOpt"]

_READ = (
    "float-quantized",
    "naive-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "nvfp4-pack-quantized",
    "mixed-precision",
    "dense",
)


@dataclass(frozen=True)
class CompressedTensors(Format):
    """compressed-tensors. Layers are told apart by their tensors; the config says what they are for."""

    name: ClassVar[str] = "llm_compressor"
    summary: ClassVar[str] = "compressed-tensors: vLLM, transformers"
    quantization: Mapping[str, object] = field(default_factory=dict)

    def refuse(self, layer: Layer) -> str | None:
        return refuse_mx(layer, self.name)

    def outputs(self, layer: Layer) -> tuple[TensorSpec, ...]:
        return mx_outputs(layer)

    def pack(self, layer: Layer, weight: QuantizedTensor) -> dict[str, Tensor]:
        return pack_mx(weight)

    def unpack(self, layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
        scheme = layer.stored.scheme or layer.scheme
        if scheme.weight.scale == "E8M0" and scheme.weight.block == (1, 32):
            return unpack_mx(layer, stored)
        return unpack_nvfp4(layer, stored) if scheme.bits == 4 else unpack_fp8(layer, stored)

    def decode(self, weight: QuantizedTensor) -> Tensor:
        return _decode_blocks(weight)

    def config(self, contents: Contents) -> dict[str, object]:
        default = contents.default
        others: dict[Scheme, list[str]] = {}
        for layer in contents.layers:
            if layer.scheme != default:
                others.setdefault(layer.scheme, []).append(layer.name)
        groups = [_group(scheme, names, bool(others)) for scheme, names in others.items()]
        groups.append(_group(default, ["Linear"], bool(others)))
        rounded = {layer.name for layer in contents.layers}
        modules = dict.fromkeys((*contents.kept, contents.head))  # a tied head is a module too, without tensors
        ignore = [module for module in modules if module not in rounded]
        return {
            "config_groups": {f"group_{i}": g for i, g in enumerate(groups)},
            "format": "mixed-precision" if others else _format_of(default),
            "global_compression_ratio": None,
            "ignore": ignore,
            "kv_cache_scheme": None,
            "provider": "roundel",
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }

    def recognize(self, quantization: Mapping[str, object]) -> Format | None:
        if quantization.get("quant_method") != "compressed-tensors":
            return None
        layout = quantization.get("format")
        if layout not in _READ:
            raise SourceError(f"compressed-tensors layout {layout!r} is not read. Read are {', '.join(_READ[:-1])}.")
        return CompressedTensors(quantization=quantization)

    def find(self, module: str, parts: Mapping[str, TensorSpec]) -> Found | None:
        found = find_mx(module, parts) or find_fp8(module, parts, self._block())
        if found is None and "weight_packed" in parts:
            if parts["weight_packed"].dtype == "I32":
                raise SourceError(f"{module} is pack-quantized, which is not read. Quantize from the original model.")
            found = find_nvfp4(module, parts)
        return found

    def _block(self) -> tuple[int, int]:
        groups = self.quantization.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            block = weights.get("block_structure") if isinstance(weights, Mapping) else None
            if isinstance(block, list) and len(block) == 2:
                return int(block[0]), int(block[1])
        return 128, 128


@dataclass(frozen=True)
class Fp8(Format):
    """FP8 with one scale for each block, as DeepSeek ships it, or one for each tensor. Only read."""

    name: ClassVar[str] = "fp8"
    summary: ClassVar[str] = "FP8 with block scales (DeepSeek), read only"
    writes: ClassVar[bool] = False
    quantization: Mapping[str, object] = field(default_factory=dict)

    def unpack(self, layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
        return unpack_fp8(layer, stored)

    def decode(self, weight: QuantizedTensor) -> Tensor:
        return _decode_blocks(weight)

    def recognize(self, quantization: Mapping[str, object]) -> Format | None:
        return Fp8(quantization=quantization) if quantization.get("quant_method") == "fp8" else None

    def find(self, module: str, parts: Mapping[str, TensorSpec]) -> Found | None:
        block = self.quantization.get("weight_block_size")
        rows, columns = block if isinstance(block, list) and len(block) == 2 else (128, 128)
        return find_fp8(module, parts, (int(rows), int(columns)))


@dataclass(frozen=True)
class ModelOpt(Format):
    """NVFP4 and FP8 as NVIDIA's Model Optimizer writes them. Only read."""

    name: ClassVar[str] = "modelopt"
    summary: ClassVar[str] = "NVFP4 and FP8 of NVIDIA Model Optimizer, read only"
    writes: ClassVar[bool] = False

    def unpack(self, layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
        assert layer.stored.scheme is not None
        return unpack_nvfp4(layer, stored) if layer.stored.scheme.bits == 4 else unpack_fp8(layer, stored)

    def recognize(self, quantization: Mapping[str, object]) -> Format | None:
        return self if quantization.get("quant_method") == "modelopt" else None

    def find(self, module: str, parts: Mapping[str, TensorSpec]) -> Found | None:
        return find_nvfp4(module, parts) or find_fp8(module, parts, (128, 128))


def _decode_blocks(weight: QuantizedTensor) -> Tensor:
    """Block-scaled FP8 decodes in bfloat16, as its readers do; every other grid exactly."""
    return decode_fp8(weight) if weight.grid.element.name == "e4m3" and weight.grid.block[0] > 1 else weight.decode()


def _format_of(scheme: Scheme) -> str:
    return "mxfp4-pack-quantized" if scheme.bits == 4 else "mxfp8-quantized"


def _group(scheme: Scheme, targets: Sequence[str], named: bool) -> dict[str, object]:
    weights: dict[str, object] = {
        "dynamic": False,
        "group_size": 32,
        "num_bits": scheme.bits,
        "scale_dtype": "torch.uint8",
        "strategy": "group",
        "symmetric": True,
        "type": "float",
    }
    return {
        "format": _format_of(scheme) if named else None,
        "input_activations": weights | {"dynamic": True},
        "output_activations": None,
        "targets": list(targets),
        "weights": weights,
    }
