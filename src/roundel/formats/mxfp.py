"""The tensors of MXFP4, MXFP8 and MXINT4 layers, as compressed-tensors and AutoRound lay them out.

    MXFP4, MXINT4   weight_packed uint8 [out, in / 2], the even column in the low nibble
    MXFP8           weight float8_e4m3fn [out, in]
    all             weight_scale uint8 [out, in / 32] (E8M0)
Source: OCP Microscaling Formats specification 1.0; compressed-tensors' mxfp4-pack-quantized and mxfp8-quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from roundel.errors import SourceError
from roundel.formats.format import Found
from roundel.scheme import PRESETS
from roundel.tensor import QuantizedTensor, TensorSpec
from roundel.unit import Layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["find_mx", "mx_outputs", "pack_mx", "pack_nibbles", "refuse_mx", "unpack_mx", "unpack_nibbles"]


def refuse_mx(layer: Layer, name: str, integers: bool = False) -> str | None:
    """Why these tensors cannot hold a layer, or None. integers: whether MXINT4 is among what they hold."""
    scheme = layer.scheme
    if not (scheme.weight.is_mx or (integers and scheme.weight == PRESETS["MXINT4"].weight)):
        return f"{name} has no layout for {scheme.name}"
    if layer.permuted:
        return f"{name} cannot store which group each column belongs to"
    if layer.shape[1] % 32:
        return f"{scheme.name} needs whole groups, {layer.shape[1]} inputs are not divisible by 32"
    return None


def mx_outputs(layer: Layer) -> tuple[TensorSpec, ...]:
    """The parts of a layer, exactly."""
    out, width = layer.shape
    scale = TensorSpec("weight_scale", "U8", (out, width // 32))
    if layer.scheme.bits == 4:
        return TensorSpec("weight_packed", "U8", (out, width // 2)), scale
    return TensorSpec("weight", "F8_E4M3", (out, width)), scale


def pack_mx(weight: QuantizedTensor) -> dict[str, Tensor]:
    """A quantized matrix -> its parts."""
    import torch

    assert not isinstance(weight.scale, QuantizedTensor), "MX scales are powers of two"
    scale = weight.scale.view(torch.uint8)
    if weight.grid.element.bits == 4:
        return {"weight_packed": pack_nibbles(weight.codes), "weight_scale": scale}
    return {"weight": weight.codes, "weight_scale": scale}


def unpack_mx(layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
    """Parts -> the quantized matrix: the inverse of `pack_mx`."""
    import torch

    grid = (layer.stored.scheme or layer.scheme).weight
    codes = unpack_nibbles(stored["weight_packed"]) if grid.element.bits == 4 else stored["weight"]
    return QuantizedTensor(grid=grid, codes=codes, scale=stored["weight_scale"].view(torch.float8_e8m0fnu))


def find_mx(module: str, parts: Mapping[str, TensorSpec], rceil: bool = False) -> Found | None:
    """An MX layer among stored parts, or None."""
    name = "weight_packed" if "weight_packed" in parts else "weight"
    if name not in parts or parts[name].dtype != ("U8" if name == "weight_packed" else "F8_E4M3"):
        return None
    if "weight_scale" not in parts:
        raise SourceError(
            f"{module} has {name} and no weight_scale. A shard or a tensor is missing; fetch the checkpoint again."
        )
    shape, scale = parts[name].shape, parts["weight_scale"]
    if len(shape) != 2:
        return None
    four = name == "weight_packed"
    width = shape[1] * 2 if four else shape[1]
    if scale.dtype not in ("U8", "F8_E8M0") or scale.shape != (shape[0], width // 32):
        return None
    preset = PRESETS[("MXFP4" if four else "MXFP8") + ("_RCEIL" if rceil else "")]
    return Found(shape=(shape[0], width), scheme=preset, parts=(name, "weight_scale"))


def pack_nibbles(codes: Tensor) -> Tensor:
    """[out, in] 4-bit codes -> [out, in / 2] bytes, the even column in the low nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """[out, n] bytes -> [out, 2 n] 4-bit codes: the inverse of `pack_nibbles`."""
    import torch

    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)
