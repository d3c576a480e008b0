"""auto_awq: AWQ checkpoints in the "gemm" layout, as transformers, GPTQModel and vLLM read them. 4 bits only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from roundel.errors import PlanError, SourceError
from roundel.formats.format import Contents, Format, Found, WordLayout
from roundel.formats.words import find_words, pack_words, refuse_words, unpack_words, word_outputs
from roundel.tensor import QuantizedTensor, TensorSpec
from roundel.unit import Layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AutoAwq"]

LAYOUT = WordLayout(order="awq")


@dataclass(frozen=True)
class AutoAwq(Format):
    """AWQ "gemm". One scheme for all layers: its config has no place for a second."""

    name: ClassVar[str] = "auto_awq"
    summary: ClassVar[str] = "AWQ gemm layout, 4 bits: transformers, GPTQModel, vLLM"
    quantization: Mapping[str, object] = field(default_factory=dict)

    def refuse(self, layer: Layer) -> str | None:
        return refuse_words(layer, self.name, (4,), "awq")

    def settle(self, layers: Sequence[Layer]) -> Format:
        schemes = {layer.scheme.name: layer for layer in layers}
        if len(schemes) > 1:
            one, other = list(schemes.values())[:2]
            raise PlanError(
                f"auto_awq: {one.name} is {one.scheme.name} and {other.name} is {other.scheme.name}. Its config "
                "holds one scheme for all layers. Use format auto_round or auto_gptq, or give all layers one scheme "
                "with --scheme."
            )
        return self

    def words(self, layer: Layer) -> WordLayout | None:
        return LAYOUT

    def outputs(self, layer: Layer) -> tuple[TensorSpec, ...]:
        return word_outputs(layer, LAYOUT)

    def pack(self, layer: Layer, weight: QuantizedTensor) -> dict[str, Tensor]:
        return pack_words(weight, LAYOUT)

    def unpack(self, layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
        return unpack_words(layer, stored, LAYOUT)

    def config(self, contents: Contents) -> dict[str, object]:
        default = contents.default
        kept = [m for m in contents.kept if m != contents.embedding]
        head = any(layer.role == "head" for layer in contents.layers)
        return {
            "bits": default.bits,
            "data_type": "int",
            "group_size": default.group_size,
            "lm_head": head,
            "modules_to_not_convert": kept or None,
            "provider": "roundel",
            "quant_method": "awq",
            "sym": default.weight.symmetric,
            "version": "gemm",
            "zero_point": not default.weight.symmetric,
        }

    def caveats(self, contents: Contents) -> tuple[str, ...]:
        inside = tuple(block + "." for block in contents.blocks)
        found = []
        if any(layer.role == "head" for layer in contents.layers):
            found.append("transformers always keeps the output head of AWQ files; GPTQModel reads it quantized")
        if any(layer.role == "expert" for layer in contents.layers):
            found.append("transformers leaves the experts of AWQ files uninitialised; GPTQModel loads them")
        if any(module.startswith(inside) and not module.endswith(("gate", "router")) for module in contents.kept):
            found.append("GPTQModel's own loader does not see which layers an AWQ file keeps; transformers does")
        return tuple(f"auto_awq: {text}" for text in found)

    def recognize(self, quantization: Mapping[str, object]) -> Format | None:
        if quantization.get("quant_method") != "awq":
            return None
        if str(quantization.get("version", "gemm")).lower() != "gemm":
            raise SourceError(
                f"AWQ layout {quantization['version']!r} is not read. Only the gemm layout is; convert it with the "
                f"tool that wrote it."
            )
        return AutoAwq(quantization=quantization)

    def find(self, module: str, parts: Mapping[str, TensorSpec]) -> Found | None:
        here = self.quantization
        symmetric = not bool(here.get("zero_point", not here.get("sym", False)))
        return find_words(module, parts, LAYOUT, here, symmetric)
