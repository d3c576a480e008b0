"""hqq: checkpoints of HQQ's own layers, as its `HQQLinear.state_dict` and transformers' `save_pretrained` lay them out.

    W_q          codes in groups [groups, group], packed along the first axis: uint8 [groups / n, group] with n codes a
                 byte (8, 6, 5 bits: 1; 4: 2; 2: 4; 1: 8), int32 [ceil(groups / 10), group] for 3 bits; of the n shares
                 that the groups are cut into, the first is in the highest bits
    scale, zero  floats [groups, 1]:  weight = (code - zero) * scale
    shape, nbits, group_size, axis, packing, view_as_float, ...   each in a small tensor, texts as one byte a letter
Source: hqq 0.2.8.post1, which reads what is written here. Groups lie along the input (axis 1); rows are whole groups.
Zero points of HQQ's own solver are no whole numbers; they are read and written as floats. transformers 5.23.0 has no
HQQ any more ("not available yet"), so it loads none of these. Not read: axis 0, scales that are quantized themselves,
float views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from roundel.errors import SourceError
from roundel.formats.format import Contents, Format, Found
from roundel.scheme import INTEGER_BITS, Scheme, float_zero_scheme, integer_scheme
from roundel.tensor import QuantizedTensor, TensorSpec
from roundel.unit import Layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Hqq"]

PER_WORD = {8: 1, 6: 1, 5: 1, 4: 2, 3: 10, 2: 4, 1: 8}  # bits -> groups that share a word
PACKING = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
WRITTEN = (2, 3, 4, 5, 6, 8)
FLOATS = ("F16", "BF16", "F32")
SMALL = 64  # bytes of a small tensor, at most
TOLD = ("shape", "nbits", "group_size", "axis", "view_as_float", "quant_scale", "quant_zero")


@dataclass(frozen=True)
class Hqq(Format):
    """HQQ's own layout, groups along the input."""

    name: ClassVar[str] = "hqq"
    summary: ClassVar[str] = "HQQ: hqq, transformers 4"
    quantization: Mapping[str, object] = field(default_factory=dict)

    def refuse(self, layer: Layer) -> str | None:
        scheme, grid = layer.scheme, layer.scheme.weight
        floats = grid.element.is_integer and grid.zero == "float" and grid.scale in FLOATS
        if not (grid.is_integer or floats) or grid.rule != "range" or scheme.input is not None:
            return f"{self.name} stores weight-only integers, {scheme.name} is none"
        if layer.permuted:
            return f"{self.name} cannot store which group each column belongs to"
        if scheme.bits not in (PER_WORD if floats else WRITTEN):
            known = f"{'1, ' if floats else ''}2, 3, 4, 5, 6 or 8 bits"
            return f"{self.name} stores {known}, {scheme.name} asks for {scheme.bits}"
        columns, groups = grid.block_of(layer.shape)[1], grid.blocks(layer.shape)
        if layer.shape[1] % columns:
            return f"{self.name} needs whole groups, {layer.shape[1]} inputs are not divisible by {columns}"
        if scheme.bits != 3 and groups[0] * groups[1] % PER_WORD[scheme.bits]:
            return f"{self.name} packs {PER_WORD[scheme.bits]} groups a byte, {groups[0] * groups[1]} do not divide"
        return None

    def outputs(self, layer: Layer) -> tuple[TensorSpec, ...]:
        grid, bits = layer.scheme.weight, layer.scheme.bits
        groups, columns = layer.parameters // grid.block_of(layer.shape)[1], grid.block_of(layer.shape)[1]
        assert isinstance(grid.scale, str)
        words = TensorSpec("W_q", "I32" if bits == 3 else "U8", (-(-groups // PER_WORD[bits]), columns))
        floats = [TensorSpec(part, grid.scale, (groups, 1)) for part in ("scale", "zero")]
        kinds = {int: ("I32", ()), bool: ("U8", ())}
        small = [
            TensorSpec(name, "U8", (len(value),)) if isinstance(value, str) else TensorSpec(name, *kinds[type(value)])
            for name, value in _told(layer).items()
        ]
        return (words, *floats, TensorSpec("shape", "I64", (2,)), *small)

    def pack(self, layer: Layer, weight: QuantizedTensor) -> dict[str, Tensor]:
        import torch

        bits, scale = weight.grid.element.bits, weight.scale
        assert isinstance(scale, torch.Tensor)
        codes, middle = weight.codes, 1 << (bits - 1)
        if weight.grid.symmetric:
            codes = (codes.to(torch.int16) + middle).to(torch.uint8)
        zero = torch.full_like(scale, middle) if weight.zero is None else weight.zero.to(scale.dtype)
        parts = {"W_q": _pack(codes.reshape(-1, weight.grid.block_of(weight.shape)[1]), bits)}
        parts |= {"scale": scale.reshape(-1, 1), "zero": zero.reshape(-1, 1), "shape": torch.tensor(weight.shape)}
        return parts | {name: _encoded(value) for name, value in _told(layer).items()}

    def unpack(self, layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
        import torch

        grid = (layer.stored.scheme or layer.scheme).weight
        bits, blocks = grid.element.bits, grid.blocks(layer.shape)
        codes = _unpack(stored["W_q"], bits)[: blocks[0] * blocks[1]].reshape(layer.shape)
        if int(codes.max()) >= 1 << bits:  # 5 and 6 bits have a byte each
            raise SourceError(
                f"{layer.name}: codes reach {int(codes.max())} in {bits} bits. Fetch the checkpoint again."
            )
        scale, zero = stored["scale"].reshape(blocks), stored["zero"].reshape(blocks)
        if grid.zero == "float":
            return QuantizedTensor(grid=grid, codes=codes, scale=scale, zero=zero)
        whole = zero.float().nan_to_num(-1).clamp(-1, 256)
        middle = float(1 << (bits - 1))
        right = whole == middle if grid.symmetric else (whole == whole.round()) & (whole >= 0) & (whole < 2 * middle)
        if not bool(right.all()):
            raise SourceError(
                f"{layer.name}: a stored zero point is not what the checkpoint's config says. Take provider out of its "
                "quantization_config."
            )
        if grid.symmetric:
            signed = (codes.to(torch.int16) - int(middle)).to(torch.int8)
            return QuantizedTensor(grid=grid, codes=signed, scale=scale)
        return QuantizedTensor(grid=grid, codes=codes, scale=scale, zero=whole.to(torch.uint8))

    def config(self, contents: Contents) -> dict[str, object]:
        default, others = contents.default, [s for s in contents.layers if s.scheme != contents.default]
        symmetric = default.weight.symmetric
        return {
            "quant_method": "hqq",
            "quant_config": {"weight_quant_params": _params(default), "scale_quant_params": None,
                             "zero_quant_params": None, "offload_meta": False},
            "skip_modules": [module for module in contents.kept if module != contents.embedding],
            "provider": "roundel",  # for our reader: zero points are whole but those of zero_floats, and of which kind
            "sym": symmetric,
            "zero_floats": [layer.name for layer in contents.layers if layer.scheme.weight.zero == "float"],
            "sym_exceptions": [layer.name for layer in others if layer.scheme.weight.symmetric != symmetric],
        }  # fmt: skip

    def caveats(self, contents: Contents) -> tuple[str, ...]:
        return ("hqq: transformers 5 does not load HQQ files; hqq itself does",)

    def recognize(self, quantization: Mapping[str, object]) -> Format | None:
        return Hqq(quantization=quantization) if quantization.get("quant_method") == "hqq" else None

    def known(
        self, module: str, parts: Mapping[str, TensorSpec], read: Callable[[str], bytes]
    ) -> Mapping[str, TensorSpec]:
        """What small tensors hold stands, for `find`, in place of their shapes."""
        if "W_q" not in parts:
            return parts
        found = dict(parts)
        for name in TOLD:
            spec = parts.get(name)
            if spec is None:
                raise _broken(module, f"no {name}")
            width = {"I64": 8, "I32": 4, "U8": 1}.get(spec.dtype)
            if width is None or spec.nbytes > SMALL:
                raise _broken(module, f"{name} as {spec.dtype} {list(spec.shape)}")
            raw = read(name)
            values = (raw[at : at + width] for at in range(0, len(raw), width))
            found[name] = replace(spec, shape=tuple(int.from_bytes(v, "little", signed=width > 1) for v in values))
        return found

    def find(self, module: str, parts: Mapping[str, TensorSpec]) -> Found | None:
        if "W_q" not in parts:
            return None
        lost = [part for part in ("scale", "zero", *TOLD) if part not in parts]
        if lost:
            raise _broken(module, f"no {' and no '.join(lost)}")
        told = {name: parts[name].shape for name in TOLD}
        if told["axis"] != (1,) or any(told[n] != (0,) for n in ("view_as_float", "quant_scale", "quant_zero")):
            raise SourceError(
                f"{module}: HQQ with groups along axis 0, views as floats, or scales or zero points that are quantized "
                "themselves is not read. Start from the original model."
            )
        shape, bits, group = told["shape"], told["nbits"], told["group_size"]
        if len(shape) != 2 or min(shape) < 1 or len(bits) != 1 or bits[0] not in PER_WORD or len(group) != 1:
            raise _broken(module, f"shape {list(shape)}, nbits {list(bits)}, group_size {list(group)}")
        (out, width), columns = shape, group[0]
        if columns < 1 or width % columns:
            raise _broken(module, f"group_size {columns} for {width} inputs")
        groups, words = out * width // columns, parts["W_q"]
        fits = words.shape == (-(-groups // PER_WORD[bits[0]]), columns)
        fits &= words.dtype == ("I32" if bits[0] == 3 else "U8") and parts["scale"].dtype in FLOATS
        fits &= all((parts[n].dtype, parts[n].shape) == (parts["scale"].dtype, (groups, 1)) for n in ("scale", "zero"))
        if not fits:
            raise _broken(module, f"W_q {list(words.shape)} for [{out}, {width}] in groups of {columns}")
        scheme = self._scheme(module, bits[0], columns, parts["scale"].dtype)
        return Found(shape=(out, width), scheme=scheme, parts=("W_q", "scale", "zero", *TOLD))

    def _scheme(self, module: str, bits: int, columns: int, dtype: str) -> Scheme:
        floats = self.quantization.get("zero_floats")
        ours = self.quantization.get("provider") == "roundel" and not (isinstance(floats, list) and module in floats)
        ours &= bits in INTEGER_BITS
        symmetric, others = self.quantization.get("sym") is True, self.quantization.get("sym_exceptions")
        symmetric = symmetric != (isinstance(others, list) and module in others)
        found = integer_scheme(bits, columns, symmetric) if ours else float_zero_scheme(bits, columns)
        return replace(found, weight=replace(found.weight, scale=dtype))


def _params(scheme: Scheme) -> dict[str, object]:
    return {"nbits": scheme.bits, "channel_wise": True, "group_size": scheme.group_size, "optimize": True,
            "round_zero": scheme.weight.zero == "code", "axis": 1, "view_as_float": False}  # fmt: skip


def _told(layer: Layer) -> dict[str, int | bool | str]:
    """What is stored in small tensors beside the shape, in HQQ's spelling."""
    grid, bits = layer.scheme.weight, layer.scheme.bits
    floats = {"F16": "torch.float16", "BF16": "torch.bfloat16", "F32": "torch.float32"}
    return {
        "nbits": bits,
        "group_size": grid.block_of(layer.shape)[1],
        "axis": 1,
        "packing": PACKING[bits],
        "unpack_view_dtype": "torch.int32" if bits == 3 else "torch.uint8",
        "view_as_float": False,
        "quant_scale": False,
        "quant_zero": False,
        "compute_dtype": floats[str(grid.scale)],
        "offload_meta": False,
        "encoded_state_dict": True,
        "stores_quant_config": True,
        "channel_wise": True,
        "optimize": True,
        "round_zero": grid.zero == "code",
    }


def _encoded(value: int | bool | str) -> Tensor:
    import torch

    if isinstance(value, str):
        return torch.tensor(list(value.encode()), dtype=torch.uint8)
    return torch.tensor(int(value), dtype=torch.uint8 if isinstance(value, bool) else torch.int32)


def _pack(groups: Tensor, bits: int) -> Tensor:
    """[groups, group] codes -> words; groups are cut into as many shares as a word holds codes."""
    import torch
    from torch.nn import functional

    count, dtype = PER_WORD[bits], torch.int32 if bits == 3 else torch.uint8
    shares = functional.pad(groups, (0, 0, 0, -len(groups) % count)).to(dtype).chunk(count)
    words = torch.zeros_like(shares[0])
    for share, shift in zip(shares, _shifts(bits), strict=True):
        words |= share << shift
    return words


def _unpack(words: Tensor, bits: int) -> Tensor:
    import torch

    mask = 0xFF if PER_WORD[bits] == 1 else (1 << bits) - 1
    return torch.cat([(words >> shift & mask).to(torch.uint8) for shift in _shifts(bits)])


def _shifts(bits: int) -> list[int]:
    return [bits * place for place in reversed(range(PER_WORD[bits]))]


def _broken(module: str, what: str) -> SourceError:
    return SourceError(f"{module}: an HQQ layer with {what}, which means nothing. Fetch the checkpoint again.")
