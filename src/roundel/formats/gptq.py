"""auto_gptq and gptq_v2: GPTQ checkpoints of both versions, as GPTQModel, transformers and vLLM read them.

Version 2 stores zero points as they are. Version 1 stores each minus one: a zero point of 0 would be the largest code,
and readers that add one to whole words then carry into the neighbouring field; so asymmetric grids for version 1 never
use 0 (`lowest_zero`). g_idx is always written: readers exist that index uninitialised memory without it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from roundel.errors import GridError
from roundel.formats.format import Contents, Format, Found, WordLayout, matching_override
from roundel.formats.words import find_words, pack_words, refuse_words, unpack_words, word_outputs
from roundel.scheme import Scheme
from roundel.tensor import QuantizedTensor, TensorSpec
from roundel.unit import Layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AutoGptq", "GptqV2"]


VERSION_1 = WordLayout(order="gptq", zero_offset=1, group_index=True)
VERSION_2 = WordLayout(order="gptq", group_index=True)


@dataclass(frozen=True)
class AutoGptq(Format):
    """GPTQ version 1."""

    name: ClassVar[str] = "auto_gptq"
    summary: ClassVar[str] = "GPTQ v1: GPTQModel, transformers, vLLM"
    layout: ClassVar[WordLayout] = VERSION_1
    checkpoint_format: ClassVar[str] = "gptq"
    quantization: Mapping[str, object] = field(default_factory=dict)

    def refuse(self, layer: Layer) -> str | None:
        return refuse_words(layer, self.name, (2, 3, 4, 8), "gptq", group_index=True)

    def grid_of(self, scheme: Scheme) -> Scheme:
        if not scheme.is_integer or scheme.weight.symmetric:
            return scheme
        return replace(scheme, weight=replace(scheme.weight, lowest_zero=1))

    def words(self, layer: Layer) -> WordLayout | None:
        return self.layout

    def outputs(self, layer: Layer) -> tuple[TensorSpec, ...]:
        return word_outputs(layer, self.layout)

    def pack(self, layer: Layer, weight: QuantizedTensor) -> dict[str, Tensor]:
        if weight.group_index is not None and not layer.permuted:  # readers that trust desc_act would not look at it
            raise GridError(f"{layer.name} has a group index, and the file's config says that no layer has")
        return pack_words(weight, self.layout)

    def unpack(self, layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
        return unpack_words(layer, stored, self.layout)

    def config(self, contents: Contents) -> dict[str, object]:
        default = contents.default
        dynamic: dict[str, object] = {}
        for module in contents.kept:
            if module.startswith(tuple(b + "." for b in contents.blocks)):
                dynamic[f"-:^{re.escape(module)}$"] = {}
        for layer in contents.layers:
            if layer.scheme != default or layer.role == "head":
                s = layer.scheme
                dynamic[f"+:^{re.escape(layer.name)}$"] = {
                    "bits": s.bits,
                    "group_size": s.group_size,
                    "sym": s.weight.symmetric,
                }
        found: dict[str, object] = {
            "bits": default.bits,
            "checkpoint_format": self.checkpoint_format,
            "damp_percent": 0.01,
            "data_type": "int",
            "desc_act": any(layer.permuted for layer in contents.layers),
            "group_size": default.group_size,
            "lm_head": any(layer.role == "head" for layer in contents.layers),
            "meta": {"quantizer": ["roundel"]},
            "provider": "roundel",
            "quant_method": "gptq",
            "static_groups": False,
            "sym": default.weight.symmetric,
            "true_sequential": False,
        }
        if dynamic:
            found["dynamic"] = dynamic
        inside = _modules_inside(contents)
        if inside is not None:
            found["modules_in_block_to_quantize"] = inside
        return found

    def caveats(self, contents: Contents) -> tuple[str, ...]:
        default, found = contents.default, []
        if any(layer.role == "head" for layer in contents.layers):
            found.append("transformers does not read a quantized output head in GPTQ files; GPTQModel does")
        if any(layer.role == "expert" for layer in contents.layers):
            found.append("transformers leaves the experts of GPTQ files uninitialised; GPTQModel loads them")
        if any(layer.scheme != default for layer in contents.layers):
            found.append("transformers reads one scheme from a GPTQ file; GPTQModel reads several")
        if not default.weight.symmetric and self.layout == VERSION_1:
            found.append("GPTQModel's own loader refuses asymmetric files of others; transformers reads them")
        return tuple(f"{self.name}: {text}" for text in found)

    def recognize(self, quantization: Mapping[str, object]) -> Format | None:
        if quantization.get("quant_method") not in ("gptq", "gptqmodel"):
            return None
        version_2 = quantization.get("checkpoint_format") == "gptq_v2"
        return GptqV2(quantization) if version_2 else AutoGptq(quantization)

    def find(self, module: str, parts: Mapping[str, TensorSpec]) -> Found | None:
        dynamic = self.quantization.get("dynamic")
        here = {**self.quantization, **matching_override(module, dynamic if isinstance(dynamic, Mapping) else {})}
        return find_words(module, parts, self.layout, here, bool(here.get("sym", True)))


@dataclass(frozen=True)
class GptqV2(AutoGptq):
    """GPTQ version 2: any zero point, which fewer readers take."""

    name: ClassVar[str] = "gptq_v2"
    summary: ClassVar[str] = "GPTQ v2: GPTQModel, transformers"
    layout: ClassVar[WordLayout] = VERSION_2
    checkpoint_format: ClassVar[str] = "gptq_v2"

    def grid_of(self, scheme: Scheme) -> Scheme:
        return scheme


def _modules_inside(contents: Contents) -> list[list[str]] | None:
    """The layers that are quantized, for readers that take that list; None where every linear of every block is.

    Readers compare ends of names: a name within a block stands for all blocks, so a layer that another block keeps
    goes by its whole name.
    """
    inside = re.compile(rf"(?:{'|'.join(map(re.escape, contents.blocks))})\.\d+\.(.+)")
    kept = {m[1] for module in contents.kept if (m := inside.fullmatch(module))}
    found = [(layer.name, m[1]) for layer in contents.layers if (m := inside.fullmatch(layer.name))]
    names = dict.fromkeys(whole if within in kept else within for whole, within in found)
    return [[name] for name in names] if kept else None
