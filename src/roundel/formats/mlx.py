"""mlx: checkpoints for mlx-lm and Apple's MLX.

    affine   weight uint32 [out, in * bits / 32], each row the little-endian stream of its codes; scales and biases
             [out, in / group], floats:  weight = scale * code + bias
    mxfp4, mxfp8   weight uint32 [out, in * bits / 32], scales uint8 [out, in / 32] (E8M0), no biases
    nvfp4    the same with scales uint8 [out, in / 16] (e4m3), and no scale for the whole matrix
Source: what `mlx_lm.convert` of mlx-lm 0.32.2 writes, and mx.dequantize of mlx 0.32.4, both compared bit for bit.

A grid with zero points is stored with bias = -zero * scale in float16. Where the zero point is a power of two, as in
every symmetric grid, that product is exact; else it is rounded, by less than zero / 2048 of a step, and `decode` says
what readers compute. The zero point itself is never lost: only one whole number gives the stored bias. Scales are
float16 whatever the model's dtype is, as in all formats here (and in auto-round's MLX files): in a bfloat16 model MLX
then computes in float32. Files of others have scales in the model's dtype and any biases; these are read as they are.
Not stored: groups other than 32, 64 and 128, and 7 bits, for which MLX has no kernel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from roundel.errors import NumericsError, SourceError
from roundel.families import text_config
from roundel.formats.format import Contents, Format, Found, Model
from roundel.formats.mxfp import pack_nibbles, unpack_nibbles
from roundel.scheme import ELEMENTS, PRESETS, Grid, Scheme
from roundel.tensor import QuantizedTensor, TensorSpec, torch_dtype
from roundel.unit import Layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BITS", "GROUPS", "Mlx", "find_mlx", "flat_rope", "refuse_mlx"]  # fmt: skip

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
_FLOATS = ("F16", "BF16", "F32")
MXFP4, MXFP8 = (replace(PRESETS[name], name=name + "A16", input=None) for name in ("MXFP4", "MXFP8"))
NVFP4 = Scheme(name="NVFP4A16", weight=Grid(element=ELEMENTS["e2m1"], block=(1, 16), scale="F8_E4M3"))
_SMALL = {"E8M0": "F8_E8M0", "F8_E4M3": "F8_E4M3"}  # a grid's scale -> safetensors' name of its dtype
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)")
_SWITCH = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True)
class Mlx(Format):
    """MLX's own layout, in all its modes.

    stacks   the module that holds a block's experts in mlx-lm's model: "experts" for GPT-OSS, "switch_mlp" for others
    """

    name: ClassVar[str] = "mlx"
    summary: ClassVar[str] = "MLX: mlx-lm"
    embeds: ClassVar[bool] = True
    quantization: Mapping[str, object] = field(default_factory=dict)
    stacks: str = "switch_mlp"

    def for_model(self, model: Model) -> Format:
        return replace(self, stacks="experts") if model.config.get("model_type") == "gpt_oss" else self

    def grid_of(self, scheme: Scheme) -> Scheme:
        """MLX's NVFP4 has no float for the whole matrix: scales are those of the weights themselves."""
        return NVFP4 if scheme == PRESETS["NVFP4A16"] else scheme

    def refuse(self, layer: Layer) -> str | None:
        return refuse_mlx(layer, self.name)

    def outputs(self, layer: Layer) -> tuple[TensorSpec, ...]:
        return mlx_outputs(layer)

    def pack(self, layer: Layer, weight: QuantizedTensor) -> dict[str, Tensor]:
        return pack_mlx(layer, weight)

    def unpack(self, layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
        return unpack_mlx(layer, stored)

    def decode(self, weight: QuantizedTensor) -> Tensor:
        return decode_mlx(weight)

    def blurs(self, layer: Layer) -> str | None:
        grid = layer.scheme.weight
        if not grid.element.is_integer or grid.symmetric or grid.offset is not None or grid.scale == "F32":
            return None
        return f"{self.name} adds a zero point times its scale, which {grid.scale} does not hold"

    def config(self, contents: Contents) -> dict[str, object]:
        default, found = contents.default, mlx_fields(contents.default)
        found |= {"provider": "roundel"}
        if all(layer.scheme.weight.offset is None for layer in contents.layers):  # else biases are any floats
            symmetric = default.weight.symmetric
            found["sym"] = symmetric  # for our reader; loaders look for names of modules only
            others = [layer.name for layer in contents.layers if layer.scheme.weight.symmetric != symmetric]
            if others:
                found["sym_exceptions"] = others
        for layer in contents.layers:
            if layer.scheme != default:
                found[(self.stack(layer.name) or (layer.name,))[0]] = mlx_fields(layer.scheme)
        return found

    def settings(self, source: Mapping[str, object], quantization: Mapping[str, object]) -> dict[str, object]:
        return {**source, **flat_rope(source), "quantization": quantization, "quantization_config": quantization}

    def stack(self, module: str) -> tuple[str, int] | None:
        found = _EXPERT.fullmatch(module)
        return (f"{found[1]}.{self.stacks}.{_SWITCH.get(found[3], found[3])}", int(found[2])) if found else None

    def unstacked(self, module: str) -> str | None:
        return unstack_experts(module)

    def recognize(self, quantization: Mapping[str, object]) -> Format | None:
        if "quant_method" in quantization or not {"group_size", "bits"} <= set(quantization):
            return None
        return Mlx(quantization=quantization)

    def find(self, module: str, parts: Mapping[str, TensorSpec]) -> Found | None:
        symmetric, others = self.quantization.get("sym"), self.quantization.get("sym_exceptions", ())
        name = (self.unstacked(module) or module).format(index=0)
        if isinstance(symmetric, bool) and isinstance(others, list) and name in others:
            symmetric = not symmetric
        here = self.quantization.get(module)
        settings = {**self.quantization, **(here if isinstance(here, Mapping) else {})}
        return find_mlx(module, parts, settings, symmetric if isinstance(symmetric, bool) else None)


def refuse_mlx(layer: Layer, name: str, kinds: str = "integers, MXFP4A16, MXFP8A16 and NVFP4A16") -> str | None:
    """Why MLX cannot hold a layer, or None. kinds: what a format with this layout stores, in words."""
    scheme, grid, (_, width) = layer.scheme, layer.scheme.weight, layer.shape
    if layer.permuted:
        return f"{name} cannot store which group each column belongs to"
    if _mode(grid) is None:
        return f"{name} stores {kinds}, {scheme.name} is none of these"
    if scheme.input is not None:
        return f"{name} leaves inputs as they are, {scheme.name} rounds them"
    if grid.element.is_integer and scheme.bits not in BITS:
        return (
            f"{name} stores {', '.join(map(str, BITS[:-1]))} or {BITS[-1]} bits, {scheme.name} asks for {scheme.bits}"
        )
    columns = grid.block_of(layer.shape)[1]
    if grid.element.is_integer and scheme.group_size not in GROUPS:  # whole rows, too: their lengths may differ
        return f"{name} has groups of 32, 64 or 128, {scheme.name} asks for {scheme.group_size}"
    if width % columns:
        return f"{name} needs whole groups, {width} inputs are not divisible by {columns}"
    return None


def mlx_fields(scheme: Scheme) -> dict[str, object]:
    """How a layer on this scheme is described."""
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": _mode(scheme.weight)}


def mlx_outputs(layer: Layer) -> tuple[TensorSpec, ...]:
    """The parts of a layer, exactly."""
    grid, (out, width) = layer.scheme.weight, layer.shape
    groups = grid.blocks(layer.shape)[1]
    weight = TensorSpec("weight", "U32", (out, width * grid.element.bits // 32))
    if not grid.element.is_integer:
        return weight, TensorSpec("scales", "U8", (out, groups))
    assert isinstance(grid.scale, str)
    return weight, *(TensorSpec(part, grid.scale, (out, groups)) for part in ("scales", "biases"))


def pack_mlx(layer: Layer, weight: QuantizedTensor) -> dict[str, Tensor]:
    """A quantized matrix -> its parts. Raises NumericsError for a bias that leaves float16."""
    import torch

    from roundel.ops.bits import pack_rows

    element, scale = weight.grid.element, weight.scale
    assert not isinstance(scale, QuantizedTensor), "MLX scales are floats"
    if not element.is_integer:
        octets = pack_nibbles(weight.codes) if element.bits == 4 else weight.codes.view(torch.uint8)
        return {"weight": octets.contiguous().view(torch.uint32), "scales": scale.view(torch.uint8)}
    codes = weight.codes
    if weight.grid.symmetric:
        codes = (codes.to(torch.int16) + (1 << (element.bits - 1))).to(torch.uint8)
    biases = _biases(weight)
    if not bool(torch.isfinite(biases).all()):
        reason = f"its weights lie beyond what a {biases.dtype} bias can reach"
        raise NumericsError(
            f"{layer.name} {list(layer.shape)}: {reason}. Keep this layer in full precision with --ignore-layers "
            f"{layer.name}.",
            reason,
        )
    return {"weight": pack_rows(codes, element.bits).view(torch.uint32), "scales": scale, "biases": biases}


def unpack_mlx(layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
    """Parts -> the quantized matrix: the inverse of `pack_mlx`.

    Raises SourceError where the config says that there are zero points, and a bias belongs to none.
    """
    import torch

    from roundel.ops.bits import unpack_rows

    grid = (layer.stored.scheme or layer.scheme).weight
    bits, scale = grid.element.bits, stored["scales"]
    if not grid.element.is_integer:
        octets = stored["weight"].view(torch.uint8)
        codes = unpack_nibbles(octets) if bits == 4 else octets.view(torch.float8_e4m3fn)
        return QuantizedTensor(grid=grid, codes=codes, scale=scale.view(torch_dtype(_SMALL[str(grid.scale)])))
    codes, biases = unpack_rows(stored["weight"].view(torch.int32), bits), stored["biases"]
    if grid.offset is not None:
        return QuantizedTensor(grid=grid, codes=codes, scale=scale, offset=biases)
    if grid.symmetric:
        signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
        found = QuantizedTensor(grid=grid, codes=signed, scale=scale)
    else:
        zero = torch.round(-biases.float() / scale.float()).nan_to_num().clamp(0, (1 << bits) - 1).to(torch.uint8)
        found = QuantizedTensor(grid=grid, codes=codes, scale=scale, zero=zero)
    if not torch.equal(_biases(found), biases):
        raise SourceError(
            f"{layer.name}: a stored bias is not its scale times a zero point, as the checkpoint's config says. Take "
            "sym out of its quantization_config."
        )
    return found


def decode_mlx(weight: QuantizedTensor) -> Tensor:
    """scale * code + bias in float32, with the bias as it is stored."""
    if weight.zero is None:
        return weight.decode()
    grid = replace(weight.grid, offset=weight.grid.scale)
    return QuantizedTensor(grid=grid, codes=weight.codes, scale=weight.scale, offset=_biases(weight)).decode()


def find_mlx(
    module: str, parts: Mapping[str, TensorSpec], settings: Mapping[str, object], symmetric: bool | None
) -> Found | None:
    """A layer among stored parts, or None.

    settings    of this layer: bits and group_size say which of the widths that fit the shapes it is
    symmetric   whether biases are those of a symmetric grid, or of zero points; None: any floats
    """
    weight, scales = parts.get("weight"), parts.get("scales")
    if weight is None or weight.dtype != "U32" or len(weight.shape) != 2:
        return None
    if scales is None:
        raise SourceError(
            f"{module} has packed weights and no scales. A tensor is missing; fetch the checkpoint again."
        )
    group, (out, words) = settings.get("group_size"), weight.shape
    fitting = {
        bits: (out, words * 32 // bits)
        for bits in BITS
        if isinstance(group, int) and group > 0 and words * 32 % bits == 0
        if scales.shape == (out, words * 32 // bits // group) and words * 32 // bits % group == 0
    }
    declared = settings.get("bits")
    declared = declared if isinstance(declared, int) else None
    if declared not in fitting and len(fitting) != 1:
        raise SourceError(
            f"{module}: weight {list(weight.shape)} and scales {list(scales.shape)} do not fit {declared!r} bits in "
            f"groups of {group!r}, as the config says. Fetch the checkpoint again, with its config.json."
        )
    bits = declared if declared is not None and declared in fitting else next(iter(fitting))
    if scales.dtype == "U8":
        small = {(4, 32): MXFP4, (8, 32): MXFP8, (4, 16): NVFP4}.get((bits, group if isinstance(group, int) else 0))
        if small is None:
            raise SourceError(
                f"{module}: MLX has no small floats of {bits} bits in groups of {group!r}. Fetch it again."
            )
        return Found(shape=fitting[bits], scheme=small, parts=("weight", "scales"))
    biases = parts.get("biases")
    if biases is None or (biases.shape, biases.dtype) != (scales.shape, scales.dtype) or biases.dtype not in _FLOATS:
        raise SourceError(f"{module}: its biases are missing or do not fit its scales. Fetch the checkpoint again.")
    assert isinstance(group, int)
    return Found(
        shape=fitting[bits], scheme=_scheme(bits, group, scales.dtype, symmetric), parts=("weight", "scales", "biases")
    )


def flat_rope(source: Mapping[str, object]) -> dict[str, object]:
    """What transformers 5 keeps in `rope_parameters`, under the names of before: most of mlx-lm's models know only
    these, and take a default where they find none."""
    text = text_config(source)
    nested = text.get("rope_parameters")
    if not isinstance(nested, Mapping) or not isinstance(nested.get("rope_theta"), (int, float)):
        return {}
    found: dict[str, object] = {"rope_theta": nested["rope_theta"]}
    if nested.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: value for key, value in nested.items() if key != "rope_theta"}
    flat = {key: value for key, value in found.items() if key not in text}
    return flat if text is source or not flat else {"text_config": {**text, **flat}}


def unstack_experts(module: str) -> str | None:
    """The inverse of `Mlx.stack`, with {index}. Where experts were called w1, w2 and w3, the module says so."""
    found = re.fullmatch(r"(.+)\.(?:switch_mlp|experts)\.(\w+)", module)
    if found is None:
        return None
    old = {new: old for old, new in _SWITCH.items()} if found[1].endswith("block_sparse_moe") else {}
    return f"{found[1]}.experts.{{index}}.{old.get(found[2], found[2])}"


def _mode(grid: Grid) -> str | None:
    if grid.element.is_integer:
        known = grid.is_integer or (grid.offset is not None and grid.offset == grid.scale and grid.scale in _FLOATS)
        return "affine" if grid.block[0] == 1 and known else None
    modes = {"mxfp4": MXFP4, "mxfp8": MXFP8, "nvfp4": NVFP4}
    return next((mode for mode, scheme in modes.items() if scheme.weight == grid), None)


def _scheme(bits: int, group: int, dtype: str, symmetric: bool | None) -> Scheme:
    element = ELEMENTS[f"{'int' if symmetric else 'uint'}{bits}"]
    offset = dtype if symmetric is None else None
    grid = Grid(element=element, block=(1, group), symmetric=bool(symmetric), scale=dtype, offset=offset)
    name = f"W{bits}A16" + ("" if group == 128 else f"G{group}") + ("" if symmetric else "_ASYM")
    return Scheme(name=name + ("_OFFSET" if symmetric is None else ""), weight=grid)


def _biases(weight: QuantizedTensor) -> Tensor:
    """What is added after scaling, in the dtype of the scales."""
    import torch

    assert isinstance(weight.scale, torch.Tensor)
    if isinstance(weight.offset, torch.Tensor):
        return weight.offset.to(weight.scale.dtype)
    zero = float(1 << (weight.grid.element.bits - 1)) if weight.zero is None else weight.zero.float()
    return (0.0 - weight.scale.float() * zero).to(weight.scale.dtype)
