"""llm_compressor: compressed-tensors checkpoints, as vLLM and transformers read them.

    pack-quantized         integers of 2 to 8 bits for weights only, or beside FP8 inputs: `formats.integers`
    int-quantized          8-bit integers beside integer inputs: `formats.integers`
    float-quantized        FP8 by tensor, channel or block, with rounded inputs: `formats.floats`
    naive-quantized        the same without: `formats.floats`
    nvfp4-pack-quantized   NVFP4: `formats.floats`
    mxfp4-pack-quantized, mxfp8-quantized   `formats.mxfp`
    mixed-precision        several of them, each group of layers with its own
What a layer is follows from its tensors, and from the config where these leave it open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from roundel.errors import SourceError
from roundel.formats.compressed_config import group_for, group_of, kv_cache_arguments, kv_cache_of, layout_of, scheme_of
from roundel.formats.floats import (
    decode_blocks,
    find_fp8,
    find_nvfp4,
    fp8_outputs,
    nvfp4_outputs,
    pack_fp8,
    pack_nvfp4,
    refuse_floats,
    unpack_fp8,
    unpack_nvfp4,
)
from roundel.formats.format import Contents, Format, Found, WordLayout
from roundel.formats.integers import (
    find_integers,
    integer_outputs,
    is_packed,
    pack_integers,
    refuse_integers,
    unpack_integers,
)
from roundel.formats.mxfp import find_mx, mx_outputs, pack_mx, refuse_mx, unpack_mx
from roundel.scheme import PRESETS, Grid, Scheme
from roundel.tensor import QuantizedTensor, TensorSpec
from roundel.unit import Layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CompressedTensors"]

_READ = (
    "pack-quantized",
    "int-quantized",
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
    caches: ClassVar[bool] = True
    quantization: Mapping[str, object] = field(default_factory=dict)

    def refuse(self, layer: Layer) -> str | None:
        grid = layer.scheme.weight
        if grid.element.is_integer:
            return refuse_integers(layer, self.name)
        return refuse_mx(layer, self.name) if grid.scale == "E8M0" else refuse_floats(layer, self.name)

    def outputs(self, layer: Layer) -> tuple[TensorSpec, ...]:
        grid = layer.scheme.weight
        if grid.element.is_integer:
            return integer_outputs(layer)
        if isinstance(grid.scale, Grid):
            return nvfp4_outputs(layer)
        return mx_outputs(layer) if grid.is_mx else fp8_outputs(layer)

    def pack(self, layer: Layer, weight: QuantizedTensor) -> dict[str, Tensor]:
        grid = layer.scheme.weight
        if grid.element.is_integer:
            return pack_integers(layer, weight)
        if isinstance(grid.scale, Grid):
            return pack_nvfp4(layer, weight)
        return pack_mx(weight) if grid.is_mx else pack_fp8(layer, weight)

    def unpack(self, layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
        grid = (layer.stored.scheme or layer.scheme).weight
        if grid.element.is_integer:
            return unpack_integers(layer, stored)
        if isinstance(grid.scale, Grid):
            return unpack_nvfp4(layer, stored)
        return unpack_mx(layer, stored) if grid.is_mx and grid.block == (1, 32) else unpack_fp8(layer, stored)

    def words(self, layer: Layer) -> WordLayout | None:
        return WordLayout(order="rows") if layer.scheme.is_integer and is_packed(layer.scheme) else None

    def decode(self, weight: QuantizedTensor) -> Tensor:
        return decode_blocks(weight)

    def config(self, contents: Contents) -> dict[str, object]:
        default = contents.default
        others: dict[Scheme, list[str]] = {}
        for layer in contents.layers:
            if layer.scheme != default:
                others.setdefault(layer.scheme, []).append(layer.name)
        groups = [group_of(scheme, names) for scheme, names in others.items()]
        groups.append(group_of(default, ["Linear"]))
        rounded = {layer.name for layer in contents.layers}
        modules = dict.fromkeys((*contents.kept, contents.head))  # a tied head is a module too, without tensors
        ignore = [module for module in modules if module not in rounded]
        layouts = {layout_of(scheme) for scheme in (default, *others)}
        return {
            "config_groups": {f"group_{i}": g for i, g in enumerate(groups)},
            "format": "mixed-precision" if len(layouts) > 1 else layout_of(default),
            "global_compression_ratio": None,
            "ignore": ignore,
            "kv_cache_scheme": None if contents.kv_cache is None else kv_cache_arguments(),
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
        sparsity, transforms = (quantization.get(key) for key in ("sparsity_config", "transform_config"))
        if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
            raise SourceError(
                f"The checkpoint stores sparse weights ({sparsity['format']!r:.60}), which are not read. Start from "
                "the original model."
            )
        if isinstance(transforms, Mapping) and transforms.get("config_groups"):
            raise SourceError(
                "The checkpoint is run with transforms of activations (transform_config), which are not read. Start "
                "from the original model."
            )
        return CompressedTensors(quantization=quantization)

    def caveats(self, contents: Contents) -> tuple[str, ...]:
        inputs = (layer.scheme.input for layer in contents.layers)
        if any(grid is not None and grid.exponent == "rceil" for grid in inputs):
            return ("llm_compressor: its config has no word for RCEIL, so readers round inputs as they do for MX",)
        return ()

    def cached(self) -> str | None:
        return kv_cache_of(self.quantization)

    def find(self, module: str, parts: Mapping[str, TensorSpec]) -> Found | None:
        group = group_for(module, self.quantization.get("config_groups"))
        declared = scheme_of(group) if group is not None else None
        if declared is not None and declared.is_integer:
            found = find_integers(module, parts, declared)
            if found is not None:
                return found
        weight = parts.get("weight_packed", parts.get("weight"))
        if weight is not None and weight.dtype in ("I32", "I8"):
            raise SourceError(
                f"{module} is stored as {weight.dtype}, and config.json has no group of integers for it. Fetch "
                "config.json again, with its quantization_config."
            )
        blocked = declared is not None and declared.weight.block[0] > 1
        block = declared.weight.block if declared is not None and blocked else PRESETS["FP8_BLOCK"].weight.block
        found = find_mx(module, parts) or find_fp8(module, parts, block, blocked) or find_nvfp4(module, parts)
        if found is None or declared is None:
            return found
        inputs = replace(found.scheme, input=declared.input, dynamic=declared.dynamic)
        named = next((preset for preset in PRESETS.values() if preset == inputs), inputs)
        used = tuple(p for p in found.parts if named.stores_input_scale or not p.startswith("input_"))
        return replace(found, scheme=named, parts=used)
