"""Small floats: FP8 by tensor, channel or block, and NVFP4, in the spellings found on the Hub.

FP8 block   weight e4m3 [out, in], weight_scale_inv [ceil(out/128), ceil(in/128)]  (DeepSeek, fp8)
            the same with weight_scale (compressed-tensors)
FP8         weight e4m3 [out, in], weight_scale [] or [1] (tensor), [out] or [out, 1] (channel); input_scale [1] where
            inputs have one scale for good
NVFP4       weight_packed uint8 [out, in/2], weight_scale e4m3 [out, in/16], weight_global_scale [1], by which scales
            are divided, input_global_scale [1] likewise where inputs are rounded (compressed-tensors); or weight,
            weight_scale, weight_scale_2 and input_scale, by which they are multiplied (ModelOpt)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from roundel.errors import GridError, SourceError
from roundel.formats.format import Found
from roundel.formats.mxfp import pack_nibbles, unpack_nibbles
from roundel.scheme import ELEMENTS, LARGEST_BLOCK, PRESETS, Grid, Scheme
from roundel.tensor import QuantizedTensor, TensorSpec
from roundel.unit import Layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "block_size",
    "decode_blocks",
    "find_fp8",
    "find_nvfp4",
    "fp8_outputs",
    "nvfp4_outputs",
    "pack_fp8",
    "pack_nvfp4",
    "refuse_floats",
    "unpack_fp8",
    "unpack_nvfp4",
]

NVFP4 = PRESETS["NVFP4A16"]
INPUTS = ("input_scale", "input_global_scale")


def refuse_floats(layer: Layer, name: str) -> str | None:
    """Why these tensors cannot hold a layer of FP8 or NVFP4, or None."""
    grid = layer.scheme.weight
    if isinstance(grid.scale, Grid):
        known = grid.equals(NVFP4.weight)
    else:
        known = grid.element.name == "e4m3" and grid.block in ((0, 0), (1, 0), (128, 128))
    if not known:
        return f"{name} has no layout for {layer.scheme.name}"
    if layer.permuted:
        return f"{name} cannot store which group each column belongs to"
    if isinstance(grid.scale, Grid) and layer.shape[1] % 16:
        return f"{layer.scheme.name} needs whole groups, {layer.shape[1]} inputs are not divisible by 16"
    return None


def fp8_outputs(layer: Layer, scale: str = "weight_scale") -> tuple[TensorSpec, ...]:
    """The parts of an FP8 layer, exactly. scale: the name of the weight's scales."""
    grid = layer.scheme.weight
    assert isinstance(grid.scale, str), "FP8 has float scales"
    shape = (1,) if grid.block == (0, 0) else grid.blocks(layer.shape)
    found = (TensorSpec("weight", "F8_E4M3", layer.shape), TensorSpec(scale, grid.scale, shape))
    return (*found, TensorSpec("input_scale", grid.scale, (1,))) if layer.scheme.stores_input_scale else found


def pack_fp8(layer: Layer, weight: QuantizedTensor, scale: str = "weight_scale") -> dict[str, Tensor]:
    """A matrix of FP8 -> its parts. Raises GridError where the scheme stores a scale of the inputs and there is
    none."""
    import torch

    assert isinstance(weight.scale, torch.Tensor), "FP8 has float scales"
    stored = weight.scale.reshape(1) if weight.grid.block == (0, 0) else weight.scale
    parts = {"weight": weight.codes, scale: stored}
    return parts | {"input_scale": _input_scale(layer, weight).to(stored.dtype)} if _measured(layer) else parts


def block_size(declared: object) -> tuple[int, int]:
    """The size of FP8's blocks that a config declares, 128 x 128 where it is silent.

    Raises SourceError for what is no pair of sizes.
    """
    if declared is None:
        return PRESETS["FP8_BLOCK"].weight.block
    sizes = declared if isinstance(declared, list) and len(declared) == 2 else [0]
    if not all(type(n) is int and 0 < n <= LARGEST_BLOCK for n in sizes):
        raise SourceError(f"The config's weight_block_size is {declared!r:.80}. Mend its quantization_config.")
    return sizes[0], sizes[1]


def find_fp8(
    module: str, parts: Mapping[str, TensorSpec], block: tuple[int, int], blocked: bool = False
) -> Found | None:
    """An FP8 layer among stored parts, or None.

    block     the config's block size, for scales that are a matrix
    blocked   whether the config says that scales belong to blocks, even where a matrix has few of them
    """
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
    blocked = (blocked or name == "weight_scale_inv") and len(scale.shape) == 2
    found = block if blocked else by_shape.get(scale.shape, block)
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
    return Found(shape=(out, width), scheme=Scheme(name=label, weight=grid), parts=("weight", name, *_inputs(parts)))


def unpack_fp8(layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
    """Parts -> the quantized matrix: the inverse of `pack_fp8`."""
    grid = (layer.stored.scheme or layer.scheme).weight
    name = "weight_scale_inv" if "weight_scale_inv" in stored else "weight_scale"
    scale, inputs = stored[name].reshape(grid.blocks(layer.shape)), stored.get("input_scale")
    found = QuantizedTensor(grid=grid, codes=stored["weight"], scale=scale)
    return found if inputs is None else replace(found, input_scale=inputs.float().reshape(1))


def decode_blocks(weight: QuantizedTensor) -> Tensor:
    """The weights as their readers compute them: of block-scaled FP8 scale and product are bfloat16, else exactly."""
    import torch

    from roundel.tensor import plain, spread

    if weight.grid.element.name != "e4m3" or weight.grid.block[0] <= 1:
        return weight.decode()
    return (weight.codes.to(torch.bfloat16) * spread(plain(weight.scale).to(torch.bfloat16), weight)).float()


def nvfp4_outputs(layer: Layer) -> tuple[TensorSpec, ...]:
    """The parts of an NVFP4 layer, exactly, under compressed-tensors' names."""
    out, width = layer.shape
    found = (
        TensorSpec("weight_packed", "U8", (out, width // 2)),
        TensorSpec("weight_scale", "F8_E4M3", (out, width // 16)),
        TensorSpec("weight_global_scale", "F32", (1,)),
    )
    return (*found, TensorSpec("input_global_scale", "F32", (1,))) if layer.scheme.stores_input_scale else found


def pack_nvfp4(layer: Layer, weight: QuantizedTensor) -> dict[str, Tensor]:
    """A matrix of NVFP4 -> its parts. Raises GridError where the scheme stores a scale of the inputs and there is
    none."""
    import torch

    assert isinstance(weight.scale, QuantizedTensor), "NVFP4's scales are quantized"
    assert isinstance(weight.scale.scale, torch.Tensor), "NVFP4's scales are quantized once"
    parts = {
        "weight_packed": pack_nibbles(weight.codes),
        "weight_scale": weight.scale.codes,
        "weight_global_scale": _divisor(weight.scale.scale),
    }
    return parts | {"input_global_scale": _divisor(_input_scale(layer, weight))} if _measured(layer) else parts


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
    inputs = _inputs(parts)
    scheme = PRESETS["NVFP4"] if inputs else NVFP4
    return Found(shape=(out, 2 * half), scheme=scheme, parts=(name, "weight_scale", share, *inputs))


def unpack_nvfp4(layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
    """Parts -> the quantized matrix, in either spelling. The tensor's scale is kept as a multiplier, whichever way it
    is stored."""
    packed = stored["weight_packed"] if "weight_packed" in stored else stored["weight"]
    if "weight_scale_2" in stored:
        share, inputs = stored["weight_scale_2"].float(), stored.get("input_scale")
    else:
        share, inputs = 1.0 / stored["weight_global_scale"].float(), stored.get("input_global_scale")
        inputs = None if inputs is None else 1.0 / inputs.float()
    assert isinstance(NVFP4.weight.scale, Grid), "NVFP4's scales are quantized"
    scale = QuantizedTensor(grid=NVFP4.weight.scale, codes=stored["weight_scale"], scale=share.reshape(1, 1))
    found = QuantizedTensor(grid=NVFP4.weight, codes=unpack_nibbles(packed), scale=scale)
    return found if inputs is None else replace(found, input_scale=inputs.float().reshape(1))


def _inputs(parts: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    return tuple(name for name in INPUTS if name in parts and parts[name].shape in ((), (1,)))


def _measured(layer: Layer) -> bool:
    return layer.scheme.stores_input_scale


def _input_scale(layer: Layer, weight: QuantizedTensor) -> Tensor:
    if weight.input_scale is None:
        raise GridError(
            f"{layer.name} is {layer.scheme.name}, which stores a scale of the inputs, and none was measured. It takes "
            "calibration data"
        )
    return weight.input_scale.float().reshape(1)


def _divisor(factor: Tensor) -> Tensor:
    """float32 [1] whose reciprocal is the factor: what was inverted once comes back bit for bit."""
    import torch

    near = 1.0 / factor.reshape(1)
    up, down = (torch.nextafter(near, torch.full_like(near, end)) for end in (float("inf"), 0.0))
    found = near
    for tried in (down, up, near):  # rounding twice may miss by the last bit
        found = torch.where(1.0 / tried == factor.reshape(1), tried, found)
    return found
