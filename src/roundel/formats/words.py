"""GPTQ's three tensors (qweight, qzeros, scales), in GPTQ's order of words or AWQ's: packing and reading.

    GPTQ   qweight int32 [in * bits / 32, out]: the little-endian stream of each column's codes, along in
           qzeros  int32 [groups, out * bits / 32]: the same stream along out
    AWQ    qweight int32 [in, out / 8], qzeros int32 [groups, out / 8]: eight columns a word, interleaved
    both   scales float16 [groups, out];  weight = (code - zero) * scale
Codes are unsigned; a symmetric grid stores code + 2^(bits-1), with that as its zero point. A last group may be short.
Inputs times bits fill whole words; where outputs times bits do not, zeros follow in qzeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from roundel.errors import GridError, SourceError
from roundel.formats.format import Found, WordLayout
from roundel.scheme import LARGEST_BLOCK, integer_scheme
from roundel.tensor import FLOAT_DTYPES, QuantizedTensor, TensorSpec
from roundel.unit import Layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BITS",
    "check_index",
    "find_words",
    "pack_columns",
    "pack_words",
    "refuse_words",
    "stored_index",
    "unpack_words",
    "word_outputs",
]

BITS = {"gptq": (2, 3, 4, 5, 6, 7, 8), "awq": (4,)}


def refuse_words(layer: Layer, name: str, bits: tuple[int, ...], order: str, group_index: bool = False) -> str | None:
    """Why a format with these widths cannot store a layer, or None. group_index: whether it stores g_idx."""
    scheme = layer.scheme
    if not scheme.is_integer or scheme.input is not None:
        return f"{name} stores weight-only integers, {scheme.name} is none"
    if scheme.bits not in bits:
        allowed = f"{bits[0]}-bit only" if len(bits) == 1 else f"{', '.join(map(str, bits[:-1]))} or {bits[-1]} bits"
        return f"{name} stores {allowed}, {scheme.name} asks for {scheme.bits}"
    if layer.permuted and not group_index:
        return f"{name} cannot store which group each column belongs to, which act_order needs without static_groups"
    if order == "gptq" and layer.shape[1] * scheme.bits % 32:
        return f"{name} readers take whole 32-bit words, {layer.shape[1]} inputs of {scheme.bits} bits do not fill them"
    if order == "awq":
        columns = scheme.weight.block_of(layer.shape)[1]
        if layer.shape[0] % 8:
            return f"{name} packs 8 output rows a word, {layer.shape[0]} do not divide"
        if layer.shape[1] % columns:
            return f"{name} needs whole groups, {layer.shape[1]} inputs are not divisible by {columns}"
    return None


def word_outputs(layer: Layer, layout: WordLayout) -> tuple[TensorSpec, ...]:
    """The parts of a layer, exactly."""
    out, width = layer.shape
    bits, groups = layer.scheme.bits, layer.scheme.weight.blocks(layer.shape)[1]
    if layout.order == "awq":
        weight, zeros = (width, out // 8), (groups, out // 8)
    else:
        weight, zeros = (-(-width * bits // 32), out), (groups, -(-out * bits // 32))
    specs = [
        TensorSpec("qweight", "I32", weight),
        TensorSpec("qzeros", "I32", zeros),
        TensorSpec("scales", "F16", (groups, out)),
    ]
    if layout.group_index:
        specs.append(TensorSpec("g_idx", "I32", (width,)))
    return tuple(specs)


def pack_words(weight: QuantizedTensor, layout: WordLayout) -> dict[str, Tensor]:
    """A quantized matrix -> its parts. Raises GridError for a group index that the layout has no place for."""
    import torch

    from roundel.ops.bits import pack_awq, pack_stream

    if weight.group_index is not None and not layout.group_index:
        raise GridError("these words hold groups of columns that lie side by side, and no group index")

    bits, (out, width) = weight.grid.element.bits, weight.shape
    middle = 1 << (bits - 1)
    assert not isinstance(weight.scale, QuantizedTensor), "word formats store float scales"
    scales = weight.scale.to(torch.float16).T.contiguous()
    if weight.zero is None:
        codes = (weight.codes.to(torch.int16) + middle).to(torch.uint8)
        zeros = torch.full(scales.shape, middle, dtype=torch.uint8, device=codes.device)
    else:
        codes, zeros = weight.codes, weight.zero.T.contiguous()
    zeros = ((zeros.to(torch.int16) - layout.zero_offset) & ((1 << bits) - 1)).to(torch.uint8)
    if layout.order == "awq":
        parts = {"qweight": pack_awq(codes.T.contiguous()), "qzeros": pack_awq(zeros)}
    else:
        parts = {
            "qweight": pack_columns(codes, bits),
            "qzeros": pack_stream(zeros, bits),
        }
    parts["scales"] = scales
    if layout.group_index:
        index = weight.group_index
        parts["g_idx"] = _group_index(width, weight.grid.block_of((out, width))[1]) if index is None else index.int()
    return parts


def unpack_words(layer: Layer, stored: Mapping[str, Tensor], layout: WordLayout) -> QuantizedTensor:
    """Parts -> the quantized matrix: the inverse of `pack_words`. Raises SourceError for parts that contradict."""
    import torch

    from roundel.ops.bits import unpack_awq, unpack_stream

    scheme = layer.stored.scheme or layer.scheme
    bits, (out, width) = scheme.bits, layer.shape
    if layout.order == "awq":
        codes, zeros = unpack_awq(stored["qweight"]).T.contiguous(), unpack_awq(stored["qzeros"]).T
    else:
        codes = _unpack_columns(stored["qweight"], bits, width)
        zeros = unpack_stream(stored["qzeros"], bits, out).T
    zeros = ((zeros.to(torch.int16) + layout.zero_offset) & ((1 << bits) - 1)).to(torch.uint8).contiguous()
    scale = stored["scales"].T.contiguous()
    columns = scheme.weight.block_of(layer.shape)[1]
    index = stored_index(layer, stored["g_idx"], scale.shape[1], columns) if "g_idx" in stored else None
    if not scheme.weight.symmetric:
        return QuantizedTensor(grid=scheme.weight, codes=codes, scale=scale, zero=zeros, group_index=index)
    middle = 1 << (bits - 1)
    if not bool((zeros == middle).all()):
        raise SourceError(
            f"{layer.name}: the config says symmetric and a stored zero point is not {middle}. The checkpoint's "
            f"config does "
            "not describe its tensors; set sym to false in its quantization_config."
        )
    signed = codes.sub_(middle).view(torch.int8)  # wraps around, as two's complement does
    return QuantizedTensor(grid=scheme.weight, codes=signed, scale=scale, group_index=index)


def find_words(
    module: str, parts: Mapping[str, TensorSpec], layout: WordLayout, settings: Mapping[str, object], symmetric: bool
) -> Found | None:
    """A layer among stored parts. Bits and sizes follow from the shapes; the group size from the config where they
    leave it open."""
    if "qweight" not in parts:
        return None
    lost = [p for p in ("qzeros", "scales") if p not in parts]
    if lost:
        raise SourceError(
            f"{module} has qweight and no {' and no '.join(lost)}. A shard or a tensor is missing; fetch the "
            f"checkpoint again."
        )
    qweight, qzeros, scales = (parts[p].shape for p in ("qweight", "qzeros", "scales"))
    if not (len(qweight) == len(qzeros) == len(scales) == 2 and qzeros[0] == scales[0] and scales[0] and scales[1]):
        raise SourceError(
            f"{module}: qweight {list(qweight)}, qzeros {list(qzeros)} and scales {list(scales)} do not fit together."
        )
    if (parts["qweight"].dtype, parts["qzeros"].dtype) != ("I32", "I32") or parts["scales"].dtype not in FLOAT_DTYPES:
        raise SourceError(f"{module}: qweight or qzeros are not int32, or its scales no floats. Fetch it again.")
    groups, out = scales
    group_size = settings.get("group_size", settings.get("q_group_size", -1))
    if not isinstance(group_size, int) or not -1 <= group_size <= LARGEST_BLOCK:
        raise SourceError(f"{module}: the config's group_size is {group_size!r}. Mend its quantization_config.")
    if layout.order == "awq":
        bits, width = 4, qweight[0]
        fits = qweight[1] * 8 == out and qzeros[1] * 8 == out
    else:
        bits = _bits(settings.get("bits"), out, qzeros[1])
        width = math.prod(parts["g_idx"].shape) if "g_idx" in parts else qweight[0] * 32 // bits
        fits = qweight[1] == out and qweight[0] == -(-width * bits // 32) and bits in BITS["gptq"]
    if not fits:
        raise SourceError(
            f"{module}: qweight {list(qweight)}, qzeros {list(qzeros)} and scales {list(scales)} do not fit together."
        )
    if "g_idx" in parts:
        check_index(module, "g_idx", parts["g_idx"], width)
    columns = width if group_size in (-1, 0) else group_size
    if -(-width // columns) != groups:
        if width % groups:
            raise SourceError(
                f"{module}: {groups} groups for {width} inputs do not fit group_size {group_size} of the config."
            )
        group_size = width // groups if groups > 1 else -1
    used = tuple(p for p in ("qweight", "qzeros", "scales", "g_idx") if p in parts)
    scheme = integer_scheme(bits, group_size or -1, symmetric)
    if parts["scales"].dtype != "F16":  # other tools write bfloat16 too; codes move over only onto the same scales
        scheme = replace(scheme, weight=replace(scheme.weight, scale=parts["scales"].dtype))
    permuted = "g_idx" in used and bool(settings.get("desc_act"))
    return Found(shape=(out, width), scheme=scheme, parts=used, permuted=permuted)


def _bits(declared: object, out: int, words: int) -> int:
    """The width of a layer: what the config declares where its zero points fit that, else the only width they fit."""
    fitting = [b for b in BITS["gptq"] if -(-out * b // 32) == words]
    return declared if isinstance(declared, int) and declared in fitting else fitting[0] if len(fitting) == 1 else 1


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """[out, in] codes -> [ceil(in * bits / 32), out] int32 words, each row's stream a column."""
    import torch

    from roundel.ops import use_kernels
    from roundel.ops.bits import pack_stream

    if use_kernels() and codes.device.type == "cpu" and codes.shape[1] % 32 == 0:
        import numpy as np

        from roundel.ops.numba import packing

        words = np.empty((codes.shape[1] * bits // 32, codes.shape[0]), np.uint32)
        packing.pack_columns(codes.contiguous().numpy().view(np.uint64), bits, words, 0)
        return torch.from_numpy(words.view(np.int32))
    return pack_stream(codes, bits).T.contiguous()


def _unpack_columns(words: Tensor, bits: int, width: int) -> Tensor:
    import torch

    from roundel.ops import use_kernels
    from roundel.ops.bits import unpack_stream

    if use_kernels() and words.device.type == "cpu" and width % 32 == 0:
        import numpy as np

        from roundel.ops.numba.rows import share_rows
        from roundel.ops.numba.unpacking import unpack_columns

        codes, stored = np.empty((words.shape[1], width), np.uint8), words.contiguous().numpy().view(np.uint32)
        octets = codes.view(np.uint64)
        share_rows(lambda a, b: unpack_columns(stored, bits, octets[a:b], a), words.shape[1], width)
        return torch.from_numpy(codes)
    return unpack_stream(words.T.contiguous(), bits, width)


def _group_index(width: int, columns: int) -> Tensor:
    import torch

    return (torch.arange(width) // columns).to(torch.int32)


def check_index(module: str, name: str, index: TensorSpec, width: int) -> None:
    """Raises SourceError for a group index that does not name a group for each of the inputs."""
    if index.shape != (width,) or index.dtype not in ("I32", "I64"):
        raise SourceError(
            f"{module}: {name} is {index.dtype} {list(index.shape)}, and there are {width} inputs. Fetch the "
            "checkpoint again."
        )


def stored_index(layer: Layer, index: Tensor, groups: int, columns: int) -> Tensor | None:
    """A stored g_idx; None where columns of a group lie side by side."""
    import torch

    if torch.equal(index.long(), _group_index(len(index), columns).long()):
        return None
    low, high = (int(v) for v in index.aminmax())
    if low < 0 or high >= groups:
        raise SourceError(
            f"{layer.name}: its g_idx names groups {low} to {high}, and it has {groups}. The file is damaged; fetch "
            "the checkpoint again."
        )
    return index.to(torch.int32)
