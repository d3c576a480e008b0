"""Integers as compressed-tensors lays them out: `pack-quantized` and `int-quantized`.

    pack   weight_packed int32 [out, ceil(in * bits / 32)]: each row's codes, one little-endian stream;
           weight_zero_point int32 [ceil(out * bits / 32), groups]: the same stream along out; weight_shape int64 [2];
           weight_g_idx int32 [in] where columns of a group do not lie side by side (only read)
    int    weight int8 [out, in]; weight_zero_point int8 [out, groups]
    both   weight_scale, a float, [out, groups] or of int [1] for the tensor;  weight = (code - zero) * scale
Codes are signed in `int`; `pack` stores code + 2^(bits-1), which is the code of our asymmetric grids as it is.
Source: the compressors of that name in compressed-tensors 0.20. Files older than its release 0.16 store 3, 5, 6 and 7
bits in wider fields; their widths do not fit, and they are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from roundel.errors import SourceError
from roundel.formats.format import Found
from roundel.formats.words import check_index, pack_columns, stored_index
from roundel.scheme import Scheme
from roundel.tensor import FLOAT_DTYPES, QuantizedTensor, TensorSpec
from roundel.unit import Layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["find_integers", "integer_outputs", "is_packed", "pack_integers", "refuse_integers", "unpack_integers"]


def is_packed(scheme: Scheme) -> bool:
    """Whether codes are packed: they are not where inputs are integers too, for kernels that take bytes."""
    return scheme.input is None or not scheme.input.element.is_integer


def refuse_integers(layer: Layer, name: str) -> str | None:
    """Why these tensors cannot hold a layer, or None."""
    scheme, columns = layer.scheme, layer.scheme.weight.block_of(layer.shape)[1]
    if not scheme.weight.is_integer or scheme.weight.rule != "range":
        return f"{name} has no layout for {scheme.name}"
    if layer.permuted:
        return f"{name} is not written with a group index, which act_order needs without static_groups"
    if layer.shape[1] % columns:
        return f"{name} needs whole groups, {layer.shape[1]} inputs are not divisible by {columns}"
    if layer.shape[1] * scheme.bits % 32 and is_packed(scheme):
        return f"{name} readers take whole 32-bit words, {layer.shape[1]} inputs of {scheme.bits} bits do not fill them"
    return None


def integer_outputs(layer: Layer) -> tuple[TensorSpec, ...]:
    """The parts of a layer, exactly."""
    return _outputs(layer.shape, layer.scheme, is_packed(layer.scheme))


def _outputs(shape: tuple[int, int], scheme: Scheme, packed: bool) -> tuple[TensorSpec, ...]:
    (out, width), bits, grid = shape, scheme.bits, scheme.weight
    blocks = grid.blocks(shape)
    assert isinstance(grid.scale, str), "scales of integers are floats"
    zero = TensorSpec("weight_zero_point", "I32", (-(-out * bits // 32), blocks[1])) if packed else None
    zero = zero or TensorSpec("weight_zero_point", "I8", blocks)
    found = (TensorSpec("weight_scale", grid.scale, blocks), *((zero,) if not grid.symmetric else ()))
    if not packed:
        return TensorSpec("weight", "I8", shape), *found
    words = TensorSpec("weight_packed", "I32", (out, -(-width * bits // 32)))
    return words, *found, TensorSpec("weight_shape", "I64", (2,))


def pack_integers(layer: Layer, weight: QuantizedTensor) -> dict[str, Tensor]:
    """A quantized matrix -> its parts."""
    import torch

    from roundel.ops.bits import pack_stream

    bits, middle = weight.grid.element.bits, 1 << (weight.grid.element.bits - 1)
    assert isinstance(weight.scale, torch.Tensor), "scales of integers are floats"
    if not is_packed(layer.scheme):
        parts = {"weight": weight.codes, "weight_scale": weight.scale}
        if weight.zero is not None:
            parts |= {"weight": _less(weight.codes, middle), "weight_zero_point": _less(weight.zero, middle)}
        return parts
    codes = weight.codes if weight.zero is not None else (weight.codes.to(torch.int16) + middle).to(torch.uint8)
    parts = {"weight_packed": pack_columns(codes, bits).T.contiguous(), "weight_scale": weight.scale}
    if weight.zero is not None:
        parts["weight_zero_point"] = pack_stream(weight.zero.T.contiguous(), bits).T.contiguous()
    return parts | {"weight_shape": torch.tensor(weight.shape, dtype=torch.int64)}


def unpack_integers(layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
    """Parts -> the quantized matrix: the inverse of `pack_integers`. Raises SourceError for parts that contradict."""
    import torch

    from roundel.ops.bits import unpack_stream

    grid = (layer.stored.scheme or layer.scheme).weight
    bits, middle, blocks = grid.element.bits, 1 << (grid.element.bits - 1), grid.blocks(layer.shape)
    scale, zero, index = stored["weight_scale"].reshape(blocks), None, None
    if "weight" in stored:
        codes = stored["weight"] if grid.symmetric else _more(stored["weight"], middle)
        if not grid.symmetric:
            zero = _more(stored["weight_zero_point"].reshape(blocks), middle)
        _check_range(layer, codes, grid.element.lo, grid.element.hi)
        return QuantizedTensor(grid=grid, codes=codes, scale=scale, zero=zero)
    shape = stored["weight_shape"].tolist()
    if shape != list(layer.shape):
        raise SourceError(
            f"{layer.name}: weight_shape says {shape}, and its other tensors fit {list(layer.shape)}. The file is "
            "damaged; fetch the checkpoint again."
        )
    codes = unpack_stream(stored["weight_packed"], bits, layer.shape[1])
    if grid.symmetric:
        codes = (codes.to(torch.int16) - middle).to(torch.int8)
    else:
        zero = unpack_stream(stored["weight_zero_point"].T.contiguous(), bits, layer.shape[0]).T.contiguous()
    if "weight_g_idx" in stored:
        index = stored_index(layer, stored["weight_g_idx"], blocks[1], grid.block_of(layer.shape)[1])
    return QuantizedTensor(grid=grid, codes=codes, scale=scale, zero=zero, group_index=index)


def find_integers(module: str, parts: Mapping[str, TensorSpec], scheme: Scheme) -> Found | None:
    """A layer among stored parts, given the scheme that the config has for it; None where its tensors are no
    integers."""
    name = next((n for n, dtype in (("weight_packed", "I32"), ("weight", "I8")) if _is(parts, n, dtype)), None)
    if name is None:
        return None
    packed, (out, width), grouped = name == "weight_packed", parts[name].shape, scheme.weight.block[1]
    if packed and "weight_g_idx" in parts:
        width = math.prod(parts["weight_g_idx"].shape)
    elif packed:  # the config's groups say how many inputs there are; without groups all words are full
        groups = parts["weight_scale"].shape[-1:] if "weight_scale" in parts else ()
        width = groups[0] * grouped if groups and grouped else width * 32 // scheme.bits
    expected = _outputs((out, width), scheme, packed)
    lost = [spec.name for spec in expected if spec.name not in parts]
    if lost:
        raise SourceError(
            f"{module} has {name} and no {' and no '.join(lost)}. A shard or a tensor is missing; fetch the checkpoint "
            "again."
        )
    wrong = [spec.name for spec in expected if not _fits(parts[spec.name], spec)]
    if wrong:
        stored = ", ".join(f"{spec.name} {parts[spec.name].dtype} {list(parts[spec.name].shape)}" for spec in expected)
        raise SourceError(
            f"{module}: {stored} do not fit together as {scheme.name} of the config ({wrong[0]}). The file is damaged, "
            "or of a release of compressed-tensors that packed otherwise; quantize from the original model."
        )
    index = ("weight_g_idx",) if packed and "weight_g_idx" in parts else ()
    if index:
        check_index(module, index[0], parts[index[0]], width)
    found = replace(scheme, weight=replace(scheme.weight, scale=parts["weight_scale"].dtype))
    return Found(shape=(out, width), scheme=found, parts=(*(spec.name for spec in expected), *index))


def _fits(stored: TensorSpec, expected: TensorSpec) -> bool:
    if expected.name == "weight_scale":
        one = expected.shape == (1, 1) and stored.shape in ((), (1,))
        return stored.dtype in FLOAT_DTYPES and (one or stored.shape == expected.shape)
    return (stored.dtype, stored.shape) == (expected.dtype, expected.shape)


def _is(parts: Mapping[str, TensorSpec], name: str, dtype: str) -> bool:
    return name in parts and parts[name].dtype == dtype and len(parts[name].shape) == 2


def _less(unsigned: Tensor, middle: int) -> Tensor:
    import torch

    return (unsigned.to(torch.int16) - middle).to(torch.int8)


def _more(signed: Tensor, middle: int) -> Tensor:
    import torch

    return (signed.to(torch.int16) + middle).to(torch.uint8)


def _check_range(layer: Layer, codes: Tensor, low: float, high: float) -> None:
    least, most = (int(v) for v in codes.aminmax())
    if least < low or most > high:
        raise SourceError(
            f"{layer.name}: codes reach {least} to {most}, the config's width ends at {int(low)} and {int(high)}. Mend "
            "its quantization_config."
        )
