"""auto_round: AutoRound checkpoints, whose `packing_format` names one of several layouts.

    auto_round:auto_gptq        all layers symmetric integers: GPTQ words, zero points stored minus one, no g_idx
    auto_round:auto_awq         all layers asymmetric 4-bit integers that AWQ's order can hold
    auto_round                  any other integers: GPTQ words, zero points stored as they are
    auto_round:llm_compressor   MXFP4 and MXFP8: the tensors of compressed-tensors
The layout is one for the whole file, so it is chosen when all layers are known (`settle`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from roundel.errors import PlanError, SourceError
from roundel.formats.autoround_mlx import MLX_PACKING
from roundel.formats.format import Contents, Format, Found, WordLayout, matching_override
from roundel.formats.mxfp import find_mx, mx_outputs, pack_mx, refuse_mx, unpack_mx
from roundel.formats.words import BITS, find_words, pack_words, refuse_words, unpack_words, word_outputs
from roundel.scheme import Scheme
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
MX_PACKING = "auto_round:llm_compressor"


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
        return refuse_mx(layer, self.name)

    def settle(self, layers: Sequence[Layer]) -> Format:
        integers = [layer for layer in layers if layer.scheme.is_integer]
        if integers and len(integers) < len(layers):
            other = next(layer for layer in layers if not layer.scheme.is_integer)
            raise PlanError(
                f"auto_round: {integers[0].name} is {integers[0].scheme.name} and {other.name} is "
                f"{other.scheme.name}. One file "
                "holds integers or MX floats, not both. Give all layers schemes of one kind."
            )
        if layers and not integers:
            return replace(self, packing=MX_PACKING)
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
        return word_outputs(layer, self._layout) if layer.scheme.is_integer else mx_outputs(layer)

    def pack(self, layer: Layer, weight: QuantizedTensor) -> dict[str, Tensor]:
        return pack_words(weight, self._layout) if weight.grid.element.is_integer else pack_mx(weight)

    def unpack(self, layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
        if (layer.stored.scheme or layer.scheme).is_integer:
            return unpack_words(layer, stored, self._layout)
        return unpack_mx(layer, stored)

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
            "packing_format": self.packing,
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
        packing = str(quantization.get("packing_format", "auto_round:gptq"))
        if packing == MLX_PACKING:
            return None
        if packing not in LAYOUTS and packing != MX_PACKING:
            raise SourceError(
                f"AutoRound packing {packing!r} is not read. Read are {', '.join((*LAYOUTS, MX_PACKING))}."
            )
        return AutoRound(packing=packing, quantization=quantization)

    def find(self, module: str, parts: Mapping[str, TensorSpec]) -> Found | None:
        if self.packing == MX_PACKING:
            activations = str(self.quantization.get("act_data_type", "mx_fp"))
            return find_mx(module, parts, rceil=activations.endswith("rceil"))
        extra = self.quantization.get("extra_config")
        here = {**self.quantization, **matching_override(module, extra if isinstance(extra, Mapping) else {})}
        return find_words(module, parts, self._layout, here, bool(here.get("sym", True)))


def _fields(scheme: Scheme) -> dict[str, object]:
    found: dict[str, object] = {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.weight.symmetric,
        "data_type": "int" if scheme.is_integer else "mx_fp",
    }
    return found | _activations(scheme)


def _activations(scheme: Scheme, off: bool = False) -> dict[str, object]:
    if scheme.input is None:
        return {}
    if off:
        return {"act_bits": 16, "act_data_type": "float"}
    return {
        "act_bits": scheme.input.element.bits,
        "act_data_type": "mx_fp_rceil" if scheme.input.exponent == "rceil" else "mx_fp",
        "act_dynamic": scheme.dynamic,
        "act_group_size": scheme.input.block[1],
        "act_sym": True,
    }
