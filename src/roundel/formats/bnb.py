"""bnb: 4-bit checkpoints as bitsandbytes and transformers save them (`load_in_4bit`), NF4 and FP4.

    weight             uint8 [out * in / 2, 1], two codes a byte along the rows, the first in the high four bits
    weight.absmax      float32 [out * in / 64], the scale of each block; with double quantization uint8 codes, and
                       weight.nested_absmax float32 [blocks / 256], weight.nested_quant_map float32 [256]
    weight.quant_map   float32 [16], the value of each code
    weight.quant_state.bitsandbytes__nf4   JSON as uint8: quant_type, blocksize, dtype, shape, and for double
                       quantization nested_blocksize, nested_dtype, nested_offset
Source: bitsandbytes 0.50.2's QuantState and transformers 5.23.0's Bnb4BitHfQuantizer; both load what is written here.

Blocks run on from row to row; this is only written where rows are whole blocks. The JSON is filled up with spaces: its
length must not depend on a number that is not known beforehand (nested_offset). Not read: bitsandbytes' 8 bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from roundel.errors import SourceError
from roundel.formats.format import Contents, Format, Found
from roundel.scheme import PRESETS, Grid, Scheme
from roundel.tensor import QuantizedTensor, TensorSpec
from roundel.unit import Layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Bnb"]

STATE = "weight.quant_state.bitsandbytes__"
STATE_BYTES = 256  # more than any state of ours takes
STATE_LIMIT = 1 << 16  # bytes of a state that is read
KINDS = ("nf4", "fp4")
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Bnb(Format):
    """bitsandbytes' 4 bits."""

    name: ClassVar[str] = "bnb"
    summary: ClassVar[str] = "bitsandbytes NF4 and FP4: transformers with bitsandbytes"
    compound: ClassVar[tuple[str, ...]] = (
        *(f"weight.{part}" for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")),
        *(STATE + kind for kind in KINDS),
    )
    quantization: Mapping[str, object] = field(default_factory=dict)

    def refuse(self, layer: Layer) -> str | None:
        grid = layer.scheme.weight
        if grid.element.name not in KINDS or grid.block != (1, 64) or layer.scheme.input is not None:
            return f"{self.name} stores NF4 and FP4, {layer.scheme.name} is neither"
        if layer.permuted:
            return f"{self.name} cannot store which group each column belongs to"
        if layer.shape[1] % grid.block[1]:
            return f"{self.name} is written for rows of whole blocks, {layer.shape[1]} inputs are not divisible by 64"
        return None

    def outputs(self, layer: Layer) -> tuple[TensorSpec, ...]:
        grid, blocks = layer.scheme.weight, math.prod(layer.scheme.weight.blocks(layer.shape))
        specs = [TensorSpec("weight", "U8", (layer.parameters // 2, 1))]
        if isinstance(grid.scale, Grid):
            specs += [
                TensorSpec("weight.absmax", "U8", (blocks,)),
                TensorSpec("weight.nested_absmax", "F32", (-(-blocks // 256),)),
                TensorSpec("weight.nested_quant_map", "F32", (256,)),
            ]
        else:
            specs.append(TensorSpec("weight.absmax", "F32", (blocks,)))
        state = TensorSpec(STATE + grid.element.name, "U8", (STATE_BYTES,))
        return (*specs, TensorSpec("weight.quant_map", "F32", (16,)), state)

    def pack(self, layer: Layer, weight: QuantizedTensor) -> dict[str, Tensor]:
        grid, scale = weight.grid, weight.scale
        codes = weight.codes.reshape(-1)
        parts = {"weight": (codes[0::2] << 4 | codes[1::2])[:, None]}
        state: dict[str, object] = {"quant_type": grid.element.name, "blocksize": grid.block[1]}
        state |= {"dtype": DTYPES.get(layer.dtype, "float32"), "shape": list(weight.shape)}
        if isinstance(scale, QuantizedTensor):
            assert not isinstance(scale.scale, QuantizedTensor)
            assert scale.offset is not None and not isinstance(scale.offset, QuantizedTensor)
            parts["weight.absmax"] = scale.codes.reshape(-1)
            parts["weight.nested_absmax"] = scale.scale.reshape(-1)
            parts["weight.nested_quant_map"] = _table(scale.grid)
            state |= {"nested_blocksize": scale.grid.block[1], "nested_dtype": "float32"}
            state["nested_offset"] = float(scale.offset[0, 0])
        else:
            parts["weight.absmax"] = scale.reshape(-1)
        parts["weight.quant_map"] = _table(grid)
        parts[STATE + grid.element.name] = _state_bytes(state)
        return parts

    def unpack(self, layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
        import torch

        grid, shape = (layer.stored.scheme or layer.scheme).weight, layer.shape
        octets = stored["weight"].reshape(-1)
        codes = torch.stack((octets >> 4, octets & 0xF), dim=-1).reshape(shape)
        _check_table(layer.name, stored["weight.quant_map"], grid)
        blocks = grid.blocks(shape)
        absmax = stored["weight.absmax"].reshape(blocks)
        if not isinstance(grid.scale, Grid):
            return QuantizedTensor(grid=grid, codes=codes, scale=absmax)
        _check_table(layer.name, stored["weight.nested_quant_map"], grid.scale)
        nested = stored["weight.nested_absmax"].reshape(grid.scale.blocks(blocks))
        state = _state(layer.name, bytes(stored[STATE + grid.element.name].flatten().tolist()))
        offset = torch.full_like(nested, float(_number(layer.name, state, "nested_offset")))
        scale = QuantizedTensor(grid=grid.scale, codes=absmax, scale=nested, offset=offset)
        return QuantizedTensor(grid=grid, codes=codes, scale=scale)

    def config(self, contents: Contents) -> dict[str, object]:
        default = contents.default.weight
        kept = [module for module in contents.kept if module != contents.embedding]
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": default.element.name,
            "bnb_4bit_use_double_quant": isinstance(default.scale, Grid),
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": DTYPES.get(contents.layers[0].dtype, "float32"),
            "llm_int8_skip_modules": kept or None,
            "provider": "roundel",
        }

    def recognize(self, quantization: Mapping[str, object]) -> Format | None:
        if quantization.get("quant_method") != "bitsandbytes":
            return None
        if not quantization.get("load_in_4bit"):
            raise SourceError("bitsandbytes' 8-bit files are not read; of its layouts the 4-bit ones are (NF4, FP4).")
        return Bnb(quantization=quantization)

    def known(
        self, module: str, parts: Mapping[str, TensorSpec], read: Callable[[str], bytes]
    ) -> Mapping[str, TensorSpec]:
        """The shape of a matrix stands in its state, not in the file's header: here `weight` gets it, [out, in / 2]."""
        state_part = next((STATE + kind for kind in KINDS if STATE + kind in parts), None)
        weight = parts.get("weight")
        if state_part is None or weight is None or weight.dtype != "U8":
            return parts
        if parts[state_part].nbytes > STATE_LIMIT:
            raise _broken(module, f"{parts[state_part].nbytes} bytes")
        state = _state(module, read(state_part))
        shape = state.get("shape")
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
            raise _broken(module, f"shape {shape!r}")
        out, width = shape
        if out * width != 2 * weight.nbytes or width % 2:
            raise _broken(module, f"shape {shape!r} for {weight.nbytes} bytes of codes")
        absmax, size = parts.get("weight.absmax"), state.get("blocksize")
        if (
            absmax is None
            or type(size) is not int
            or size.bit_count() != 1
            or absmax.shape != (-(-out * width // size),)
        ):
            raise _broken(module, f"blocksize {size!r} for absmax {list(absmax.shape) if absmax else None}")
        if state.get("nested_blocksize", 256) != 256 or state.get("quant_type") != state_part.removeprefix(STATE):
            raise _broken(
                module, f"nested_blocksize {state.get('nested_blocksize')!r}, type {state.get('quant_type')!r}"
            )
        return {**parts, "weight": replace(weight, shape=(out, width // 2))}

    def find(self, module: str, parts: Mapping[str, TensorSpec]) -> Found | None:
        kind = next((kind for kind in KINDS if STATE + kind in parts), None)
        weight, absmax = parts.get("weight"), parts.get("weight.absmax")
        if kind is None:
            if weight is not None and weight.dtype == "U8" and absmax is not None:
                raise SourceError(f"{module} is packed and has no quant_state. A tensor is missing; fetch it again.")
            return None
        nested = absmax is not None and absmax.dtype == "U8"
        names = ["weight", "weight.absmax", "weight.quant_map", STATE + kind]
        names += ["weight.nested_absmax", "weight.nested_quant_map"] if nested else []
        lost = [name for name in names if name not in parts]
        if lost or weight is None or absmax is None:
            raise SourceError(f"{module} has no {' and no '.join(lost)}. A tensor is missing; fetch it again.")
        for name in ("weight", STATE + kind):
            if parts[name].dtype != "U8":
                raise SourceError(f"{module}: {name} is {parts[name].dtype}, and not U8. Fetch the checkpoint again.")
        out, width = weight.shape[0], weight.shape[1] * 2
        blocks = math.prod(absmax.shape)
        expected: dict[str, tuple[str, tuple[int, ...]]] = {"weight.quant_map": ("F32", (16,))}
        expected["weight.absmax"] = ("U8" if nested else "F32", (blocks,))
        if nested:
            expected |= {
                "weight.nested_absmax": ("F32", (-(-blocks // 256),)),
                "weight.nested_quant_map": ("F32", (256,)),
            }
        wrong = [name for name, spec in expected.items() if (parts[name].dtype, parts[name].shape) != spec]
        if wrong:
            spec = parts[wrong[0]]
            raise SourceError(
                f"{module}: {wrong[0]} is {spec.dtype} {list(spec.shape)}, which does not fit. Fetch it again."
            )
        return Found(shape=(out, width), scheme=_scheme(kind, (out, width), blocks, nested), parts=tuple(names))


def _scheme(kind: str, shape: tuple[int, int], blocks: int, nested: bool) -> Scheme:
    """The scheme of a stored matrix: blocks are groups of a row where rows are whole blocks, and flat elsewhere."""
    size = next(s for s in (2**n for n in range(1, 40)) if -(-shape[0] * shape[1] // s) <= blocks)
    preset = PRESETS[kind.upper() + ("_DQ" if nested else "")]
    grid = replace(preset.weight, block=(1, size), flat=shape[1] % size != 0)
    return preset if grid == preset.weight else Scheme(name=f"{preset.name}_{size}", weight=grid)


def _table(grid: Grid) -> Tensor:
    import torch

    return torch.tensor(grid.element.values, dtype=torch.float32)


def _check_table(name: str, stored: Tensor, grid: Grid) -> None:
    import torch

    if not torch.equal(stored, _table(grid)):
        raise SourceError(
            f"{name}: its quant_map is not {grid.element.name}'s. Only bitsandbytes' own tables are read."
        )


def _state_bytes(state: Mapping[str, object]) -> Tensor:
    import torch

    return torch.tensor(list(json.dumps(state).ljust(STATE_BYTES).encode()), dtype=torch.uint8)


def _state(module: str, raw: bytes) -> dict[str, object]:
    try:
        found = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _broken(module, f"no JSON ({error})") from error
    if not isinstance(found, dict):
        raise _broken(module, "no mapping")
    return found


def _number(module: str, state: Mapping[str, object], key: str) -> float:
    value = state.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _broken(module, f"{key} {value!r}")
    return value


def _broken(module: str, what: str) -> SourceError:
    return SourceError(f"{module}: its quant_state says {what}, which means nothing. Fetch the checkpoint again.")
