"""Small floats as sources: FP8 by tensor, channel or block, and NVFP4, in the spellings found on the Hub.

FP8 block   weight e4m3 [out, in], weight_scale_inv [ceil(out/128), ceil(in/128)]  (DeepSeek, fp8)
            the same with weight_scale (compressed-tensors)
FP8         weight e4m3 [out, in], weight_scale [] or [1] (tensor), [out] or [out, 1] (channel)
NVFP4       weight_packed uint8 [out, in/2], weight_scale e4m3 [out, in/16], weight_global_scale [1], by which scales
            are divided (compressed-tensors); or weight, weight_scale and weight_scale_2, by which they are multiplied
            (ModelOpt)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from roundel.errors import SourceError
from roundel.formats.format import Found
from roundel.formats.mxfp import unpack_nibbles
from roundel.scheme import ELEMENTS, Grid, Scheme
from roundel.tensor import QuantizedTensor, TensorSpec
from roundel.unit import Layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["decode_fp8", "find_fp8", "find_nvfp4", "unpack_fp8", "unpack_nvfp4"]

E4M3_SCALE = Grid(element=ELEMENTS["e4m3"], block=(0, 0), scale="F32")
NVFP4 = Scheme(name="NVFP4", weight=Grid(element=ELEMENTS["e2m1"], block=(1, 16), scale=E4M3_SCALE))


def find_fp8(module: str, parts: Mapping[str, TensorSpec], block: tuple[int, int]) -> Found | None:
    """An FP8 layer among stored parts, or None. block: the config's block size, for scales that are a matrix."""
    weight = parts.get("weight")
    if weight is None or weight.dtype != "F8_E4M3" or len(weight.shape) != 2:
        return None
    name = next((n for n in ("weight_scale_inv", "weight_scale") if n in parts), None)
    if name is None:
        raise SourceError(
            f"{module} is FP8 and has no scale. A shard or a tensor is missing; fetch the checkpoint again."
        )
    scale, (out, width) = parts[name], weight.shape
    if scale.dtype not in ("F32", "BF16", "F16", "F8_E8M0"):
        raise SourceError(f"{module}: {name} is {scale.dtype}, which is no scale of FP8. Fetch the checkpoint again.")
    by_shape = {(): (0, 0), (1,): (0, 0), (1, 1): (0, 0), (out,): (1, 0), (out, 1): (1, 0)}
    found = block if name == "weight_scale_inv" and len(scale.shape) == 2 else by_shape.get(scale.shape, block)
    grid = Grid(
        element=ELEMENTS["e4m3"],
        block=found,
        scale=scale.dtype.removeprefix("F8_") if scale.dtype == "F8_E8M0" else scale.dtype,
    )
    if found == block and grid.blocks((out, width)) != scale.shape:
        raise SourceError(
            f"{module}: {name} {list(scale.shape)} does not fit [{out}, {width}] in blocks of {block[0]}x{block[1]}."
        )
    label = {(0, 0): "FP8_TENSOR", (1, 0): "FP8_CHANNEL"}.get(found, "FP8_BLOCK")
    return Found(shape=(out, width), scheme=Scheme(name=label, weight=grid), parts=("weight", name))


def unpack_fp8(layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
    """Parts -> the quantized matrix."""
    assert layer.stored.scheme is not None
    grid = layer.stored.scheme.weight
    name = "weight_scale_inv" if "weight_scale_inv" in stored else "weight_scale"
    scale = stored[name].reshape(grid.blocks(layer.shape))
    return QuantizedTensor(grid=grid, codes=stored["weight"], scale=scale)


def decode_fp8(weight: QuantizedTensor) -> Tensor:
    """The weights of a block-scaled FP8 matrix as its readers compute them: scale and product in bfloat16."""
    import torch

    from roundel.tensor import plain, spread

    return (weight.codes.to(torch.bfloat16) * spread(plain(weight.scale).to(torch.bfloat16), weight)).float()


def find_nvfp4(module: str, parts: Mapping[str, TensorSpec]) -> Found | None:
    """An NVFP4 layer among stored parts, in either spelling, or None."""
    name = "weight_packed" if "weight_packed" in parts else "weight"
    scale = parts.get("weight_scale")
    if name not in parts or parts[name].dtype != "U8" or (scale is not None and scale.dtype != "F8_E4M3"):
        return None
    share = "weight_global_scale" if name == "weight_packed" else "weight_scale_2"
    lost = [p for p in ("weight_scale", share) if p not in parts]
    if lost:
        raise SourceError(
            f"{module} has {name} and no {' and no '.join(lost)}. A shard or a tensor is missing; fetch the "
            f"checkpoint again."
        )
    assert scale is not None
    shape = parts[name].shape
    if len(shape) != 2 or scale.shape != (shape[0], shape[1] // 8) or parts[share].nbytes != 4:
        raise SourceError(
            f"{module}: {name} {list(shape)}, weight_scale {list(scale.shape)} and {share} "
            f"{list(parts[share].shape)} do not fit together in groups of 16. Fetch the checkpoint again."
        )
    out, half = shape
    return Found(shape=(out, 2 * half), scheme=NVFP4, parts=(name, "weight_scale", share))


def unpack_nvfp4(layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
    """Parts -> the quantized matrix. The tensor's scale is kept as a multiplier, whichever way it is stored."""
    packed = stored["weight_packed"] if "weight_packed" in stored else stored["weight"]
    if "weight_scale_2" in stored:
        share = stored["weight_scale_2"].float()
    else:
        share = 1.0 / stored["weight_global_scale"].float()
    scale = QuantizedTensor(grid=E4M3_SCALE, codes=stored["weight_scale"], scale=share.reshape(1, 1))
    return QuantizedTensor(grid=NVFP4.weight, codes=unpack_nibbles(packed), scale=scale)
