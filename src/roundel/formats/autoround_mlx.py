"""auto_round:mlx: the tensors of `mlx`, under the config that auto-round writes for them.

`quantization`, for mlx-lm, is beside `quantization_config`, for auto-round: packing_format "mlx", and in `extra_config`
what differs from layer to layer. Integers only. Source: the files of auto-round 0.16.1, which have no
extra_config: there, widths follow from the shapes. Biases of files that are not our own are read as any floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from roundel.formats.format import Contents, Format, Found, matching_override
from roundel.formats.mlx import Mlx, find_mlx, flat_rope, refuse_mlx
from roundel.scheme import Scheme
from roundel.tensor import TensorSpec
from roundel.unit import Layer

__all__ = ["MLX_PACKING", "AutoRoundMlx"]

MLX_PACKING = "mlx"


@dataclass(frozen=True)
class AutoRoundMlx(Mlx):
    """AutoRound's MLX export."""

    name: ClassVar[str] = "auto_round:mlx"
    summary: ClassVar[str] = "MLX's layout under auto-round's config: mlx-lm"

    def refuse(self, layer: Layer) -> str | None:
        if not layer.scheme.weight.element.is_integer:
            return f"{self.name} stores integers, {layer.scheme.name} is none"
        return refuse_mlx(layer, self.name, "integers")

    def config(self, contents: Contents) -> dict[str, object]:
        extra: dict[str, object] = {m: {"bits": 16} for m in contents.kept if m != contents.embedding}
        for layer in contents.layers:
            if layer.scheme != contents.default:
                extra[layer.name] = _fields(layer.scheme)
        found: dict[str, object] = {"quant_method": "auto-round", "packing_format": MLX_PACKING}
        found |= {**_fields(contents.default), "data_type": "int"}
        if all(layer.scheme.weight.offset is None for layer in contents.layers):
            found["provider"] = "roundel"  # for our reader: biases are zero points
        return found | ({"extra_config": extra} if extra else {})

    def settings(self, source: Mapping[str, object], quantization: Mapping[str, object]) -> dict[str, object]:
        found = {key: quantization[key] for key in ("group_size", "bits")}
        extra = quantization.get("extra_config", {})
        for name, fields in extra.items() if isinstance(extra, Mapping) else ():
            module = (self.stack(name) or (name,))[0]
            kept = fields["bits"] == 16
            found[module] = False if kept else {key: fields[key] for key in ("group_size", "bits")}
        return {**source, **flat_rope(source), "quantization": found, "quantization_config": quantization}

    def recognize(self, quantization: Mapping[str, object]) -> Format | None:
        is_ours = quantization.get("quant_method") in ("auto-round", "intel/auto-round")
        return AutoRoundMlx(quantization) if is_ours and quantization.get("packing_format") == MLX_PACKING else None

    def find(self, module: str, parts: Mapping[str, TensorSpec]) -> Found | None:
        extra = self.quantization.get("extra_config")
        name = (self.unstacked(module) or module).format(index=0)
        here = {**self.quantization, **matching_override(name, extra if isinstance(extra, Mapping) else {})}
        zeros = here.get("provider") == "roundel"
        return find_mlx(module, parts, here, bool(here.get("sym", True)) if zeros else None)


def _fields(scheme: Scheme) -> dict[str, object]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.weight.symmetric}
