"""auto_round: AutoRound checkpoints, whose `packing_format` names one of several layouts.

    auto_round:auto_gptq        all layers symmetric integers: GPTQ words, zero points stored minus one, no g_idx
    auto_round:auto_awq         all layers asymmetric 4-bit integers that AWQ's order can hold
    auto_round                  any other integers: GPTQ words, zero points stored as they are; or MXINT4
    auto_round:llm_compressor   MXFP4, MXFP8 and NVFP4: the tensors of compressed-tensors
    auto_round:fp8_static       FP8_STATIC: FP8 by channel, scales [out], and a scale for the inputs
    auto_round:fp8              FP8_BLOCK: scales named weight_scale_inv, which codes are multiplied by
    (no packing_format)         FPW8A16: FP8 and one scale [1]
The layout is one for the whole file, so it is chosen when all layers are known (`settle`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from roundel.errors import PlanError, SourceError
from roundel.formats.autoround_mlx import MLX_PACKING
from roundel.formats.floats import (
    block_size,
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
from roundel.formats.format import Contents, Format, Found, WordLayout, matching_override
from roundel.formats.mxfp import find_mx, mx_outputs, pack_mx, refuse_mx, unpack_mx
from roundel.formats.words import BITS, find_words, pack_words, refuse_words, unpack_words, word_outputs
from roundel.scheme import PRESETS, Grid, Scheme
from roundel.tensor import QuantizedTensor, TensorSpec
from roundel.unit import Layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AutoRound"]

LAYOUT_VERSION = "0.16.1"  # the auto-round release whose files these equal
LAYOUTS = {
    "auto_round:auto_gptq": WordLayout(order="gptq", zero_offset=1),
    "auto_round:gptq": WordLayout(order="gptq", zero_offset=1),
    "auto_round:gptqmodel": WordLayout(order="gptq"),
    "auto_round:auto_awq": WordLayout(order="awq"),
    "auto_round:awq": WordLayout(order="awq"),
    "auto_round": WordLayout(order="gptq"),
}
FLOAT_PACKING = "auto_round:llm_compressor"
STATIC_PACKING = "auto_round:fp8_static"
BLOCK_PACKING = "auto_round:fp8"
UNNAMED = ""
FP8_PACKINGS = {"FP8_STATIC": STATIC_PACKING, "FP8_BLOCK": BLOCK_PACKING, "FPW8A16": UNNAMED}


@dataclass(frozen=True)
class AutoRound(Format):
    """AutoRound's own format. `packing` is None until `settle` or `recognize` fixes it."""

    name: ClassVar[str] = "auto_round"
    summary: ClassVar[str] = "AutoRound: transformers with auto-round, vLLM, SGLang"
    packing: str | None = None
    quantization: Mapping[str, object] = field(default_factory=dict)

    def refuse(self, layer: Layer) -> str | None:
        if layer.scheme.is_integer:
            return refuse_words(layer, self.name, BITS["gptq"], "gptq")
        if layer.scheme not in (PRESETS["NVFP4"], *map(PRESETS.get, FP8_PACKINGS)):
            if layer.scheme.input is None or layer.scheme.weight.scale != "E8M0":
                return f"{self.name} has no layout for {layer.scheme.name}"
            return refuse_mx(layer, self.name, integers=True)
        return refuse_floats(layer, self.name)

    def settle(self, layers: Sequence[Layer]) -> Format:
        kinds = {_float_packing(layer.scheme): layer for layer in layers}
        if len(kinds) > 1:
            one, other = list(kinds.values())[:2]
            raise PlanError(
                f"auto_round: {one.name} is {one.scheme.name} and {other.name} is {other.scheme.name}. One file holds "
                "integers, MXINT4, FP8 or other floats, not several of them. Give all layers schemes of one kind."
            )
        packing = next(iter(kinds), None)
        if packing is not None:
            return replace(self, packing=packing)
        if all(layer.scheme.weight.symmetric for layer in layers):
            return replace(self, packing="auto_round:auto_gptq")
        asymmetric = all(not layer.scheme.weight.symmetric for layer in layers)
        if asymmetric and all(refuse_words(layer, "", (4,), "awq") is None for layer in layers):
            return replace(self, packing="auto_round:auto_awq")
        return replace(self, packing="auto_round")

    def words(self, layer: Layer) -> WordLayout | None:
        return self._layout if layer.scheme.is_integer else None

    @property
    def _layout(self) -> WordLayout:
        assert self.packing is not None, "settle first"
        return LAYOUTS[self.packing]

    def outputs(self, layer: Layer) -> tuple[TensorSpec, ...]:
        if layer.scheme.is_integer:
            return word_outputs(layer, self._layout)
        if layer.scheme.weight.scale == "E8M0":
            return mx_outputs(layer)
        if isinstance(layer.scheme.weight.scale, Grid):
            return nvfp4_outputs(layer)
        specs = fp8_outputs(layer, _scale_name(layer.scheme))
        return tuple(replace(s, shape=s.shape[:1]) if s.name == "weight_scale" else s for s in specs)

    def pack(self, layer: Layer, weight: QuantizedTensor) -> dict[str, Tensor]:
        if weight.grid.element.is_integer:
            return pack_words(weight, self._layout)
        if weight.grid.scale == "E8M0":
            return pack_mx(weight)
        if isinstance(weight.grid.scale, Grid):
            return pack_nvfp4(layer, weight)
        parts = pack_fp8(layer, weight, _scale_name(layer.scheme))
        return parts | {"weight_scale": parts["weight_scale"].flatten()} if "weight_scale" in parts else parts

    def unpack(self, layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
        grid = (layer.stored.scheme or layer.scheme).weight
        if grid.element.is_integer:
            return unpack_words(layer, stored, self._layout)
        if grid.scale == "E8M0":
            return unpack_mx(layer, stored)
        return unpack_nvfp4(layer, stored) if isinstance(grid.scale, Grid) else unpack_fp8(layer, stored)

    def decode(self, weight: QuantizedTensor) -> Tensor:
        return decode_blocks(weight)

    def config(self, contents: Contents) -> dict[str, object]:
        default = contents.default
        extra: dict[str, object] = {
            module: {"bits": 16, "data_type": "float"} | _activations(default, off=True)
            for module in contents.kept
            if module != contents.embedding
        }
        inside = tuple(f"{block}." for block in contents.blocks)
        for layer in contents.layers:  # readers look into the blocks by themselves, and elsewhere only where told
            if layer.scheme != default or not layer.name.startswith(inside):
                extra[layer.name] = _fields(layer.scheme)
        found: dict[str, object] = {
            "quant_method": "auto-round",
            **({"packing_format": self.packing} if self.packing != UNNAMED else {}),
            **_fields(default),
            "iters": 0,
            "autoround_version": LAYOUT_VERSION,
            "provider": "roundel",
            "block_name_to_quantize": ",".join(contents.blocks),
        }
        if extra:
            found["extra_config"] = extra
        return found

    def recognize(self, quantization: Mapping[str, object]) -> Format | None:
        if quantization.get("quant_method") not in ("auto-round", "intel/auto-round"):
            return None
        unnamed = "packing_format" not in quantization and _kind(quantization) == "fp"
        packing = UNNAMED if unnamed else str(quantization.get("packing_format", "auto_round:gptq"))
        if packing == MLX_PACKING:
            return None
        known = (*LAYOUTS, FLOAT_PACKING, STATIC_PACKING, BLOCK_PACKING)
        if not unnamed and packing not in known:
            raise SourceError(f"AutoRound packing {packing!r} is not read. Read are {', '.join(known)}.")
        turned = next((key for key in ("rotation_config", "spinquant_config") if quantization.get(key)), None)
        if turned is not None:
            raise SourceError(
                f"The checkpoint is run with rotations of activations ({turned}), which are not read. Start from the "
                "original model."
            )
        return AutoRound(packing=packing, quantization=quantization)

    def find(self, module: str, parts: Mapping[str, TensorSpec]) -> Found | None:
        if self.packing == FLOAT_PACKING:
            activations = str(self.quantization.get("act_data_type", "mx_fp"))
            return find_mx(module, parts, rceil=activations.endswith("rceil")) or find_nvfp4(module, parts)
        if _kind(self.quantization) == "mx_int":
            found = find_mx(module, parts)
            return found and replace(found, scheme=PRESETS["MXINT4"])
        fp8 = next((PRESETS[name] for name, packing in FP8_PACKINGS.items() if packing == self.packing), None)
        if fp8 is not None:
            found = find_fp8(module, parts, block_size(self.quantization.get("weight_block_size")))
            return found and replace(found, scheme=replace(fp8, weight=found.scheme.weight))
        extra = self.quantization.get("extra_config")
        here = {**self.quantization, **matching_override(module, extra if isinstance(extra, Mapping) else {})}
        return find_words(module, parts, self._layout, here, bool(here.get("sym", True)))


def _float_packing(scheme: Scheme) -> str | None:
    """The packing of floats; None for integers, whose packing depends on all of them."""
    if scheme.is_integer:
        return None
    if scheme == PRESETS["MXINT4"]:
        return "auto_round"
    return next((packing for name, packing in FP8_PACKINGS.items() if scheme == PRESETS[name]), FLOAT_PACKING)


def _scale_name(scheme: Scheme) -> str:
    """Of FP8's scales."""
    return "weight_scale_inv" if scheme == PRESETS["FP8_BLOCK"] else "weight_scale"


def _kind(fields: Mapping[str, object]) -> str:
    """The data type of a config, without the width that some spell behind it."""
    return str(fields.get("data_type", "int")).rstrip("0123456789")


def _data_type(grid: Grid) -> str:
    if isinstance(grid.scale, Grid):
        return "nv_fp"
    if grid.scale == "E8M0":
        return "mx_fp" if grid.is_mx else "mx_int"
    return "int" if grid.element.is_integer else "fp"


def _fields(scheme: Scheme) -> dict[str, object]:
    found: dict[str, object] = {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.weight.symmetric,
        "data_type": _data_type(scheme.weight),
    }
    if found["data_type"] == "fp":
        found |= {"activation_scheme": "dynamic" if scheme.dynamic else "static", "fmt": "e4m3"}
    if scheme.weight.block[0] > 1:
        found |= {"group_size": list(scheme.weight.block), "weight_block_size": list(scheme.weight.block)}
    return found | _activations(scheme)


def _activations(scheme: Scheme, off: bool = False) -> dict[str, object]:
    if scheme.input is None:
        return {}
    if off:
        return {"act_bits": 16, "act_data_type": "float"}
    suffix = "_rceil" if scheme.input.exponent == "rceil" else ""
    if isinstance(scheme.input.scale, Grid):
        suffix = "4_with_static_gs"
    return {
        "act_bits": scheme.input.element.bits,
        "act_data_type": _data_type(scheme.input) + suffix,
        "act_dynamic": scheme.dynamic,
        "act_group_size": scheme.input.block[1],
        "act_sym": True,
    }
