"""GGUF models: one file for llama.cpp, straight from the checkpoint. `gguf:q4_k_m` is one of llama.cpp's mixtures;
plain `gguf` stores what the scheme says (GGUF:Q6_K ...).

Names, metadata, mixtures and what llama.cpp's converter changes are in the files beside this one. config.json stands
beside the file, and says of each matrix which type it has and how it is found again; llama.cpp does not need it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from roundel.errors import PlanError, SourceError
from roundel.formats.format import Contents, Format, Found, Model
from roundel.formats.gguf.architectures import architecture_of, settings_of
from roundel.formats.gguf.changes import extra_tensors, is_float32, norm_offset
from roundel.formats.gguf.metadata import metadata
from roundel.formats.gguf.mixtures import FILE_TYPES, MIXTURES, mixed_model, type_of
from roundel.formats.gguf.names import (
    expert_of,
    is_latent,
    latent_cuts,
    left_out,
    row_order,
    rows_permuted,
    tensor_name,
    text_name,
)
from roundel.io.gguf import GGML_TYPES, GgufTensor, lay_out_gguf
from roundel.io.safetensors import Place, ShardLayout, Stacks
from roundel.scheme import PRESETS, Scheme
from roundel.tensor import QuantizedTensor, TensorSpec
from roundel.unit import Cut, Layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Gguf", "gguf_variant"]

PREFIX = "GGUF:"


@dataclass(frozen=True)
class Gguf(Format):
    """llama.cpp's file.

    model          what is written, once it is known
    quantization   of a checkpoint that is read
    """

    name: ClassVar[str] = "gguf"
    summary: ClassVar[str] = "one GGUF file: llama.cpp and what is built on it; gguf:TYPE for its mixtures"
    copies: ClassVar[bool] = False
    embeds: ClassVar[bool] = True
    packs_rows: ClassVar[bool] = True
    in_order: ClassVar[bool] = True
    splits: ClassVar[bool] = True
    mixture: ClassVar[str] = ""
    model: Model | None = None
    quantization: Mapping[str, Any] = field(default_factory=dict)

    def for_model(self, model: Model) -> Format:
        try:
            architecture_of(model.config)
        except SourceError as error:
            raise PlanError(str(error)) from error
        return replace(self, model=model)

    def cuts(self, module: str, config: Mapping[str, object]) -> Mapping[str, Cut]:
        if not is_latent(module):
            return {}
        try:
            settings, known = settings_of(config), architecture_of(config)
        except SourceError:
            return {}
        absent = known != "deepseek2" or left_out(f"{module}.weight", settings, known) is not None
        return {} if absent else latent_cuts(module, settings)

    def schemes(self) -> Mapping[str, Scheme | None] | None:
        if not self.mixture or self.model is None:
            return None
        mixed, model = MIXTURES[self.mixture], self.model
        tensors = {name: self._named(f"{name}.weight") for name in model.matrices}
        names = [tensor for tensor in tensors.values() if tensor is not None]
        whole = mixed_model(self._settings, self._architecture, names, importance=model.importance)
        experts = {name: expert_of(f"{name}.weight") for name in model.matrices}
        count = 1 + max((e for e in experts.values() if e is not None), default=0)
        found: dict[str, Scheme | None] = {}
        for name, shape in model.matrices.items():
            tensor = tensors[name]
            if tensor is None:
                continue
            stored = (count, *shape) if experts[name] is not None else self._stored_shape(name, shape)
            kind = type_of(GgufTensor(tensor, "F32" if is_float32(tensor, stored) else "F16", stored), mixed, whole)
            found[name] = PRESETS.get(PREFIX + kind)
        return found

    def refuse(self, layer: Layer) -> str | None:
        if not layer.scheme.name.startswith(PREFIX):
            return f"{self.name} stores ggml's types, not {layer.scheme.name}: name one with --format gguf:q4_k_m"
        if layer.permuted:
            return f"{self.name} cannot store which group each column belongs to"
        if layer.shape[1] % layer.scheme.weight.row_columns:
            return f"{layer.scheme.name} stores whole blocks of {layer.scheme.weight.row_columns}"
        if self.model is not None and self._named(layer.tensor) is None:
            return f"llama.cpp's {self._architecture} has no such tensor"
        return None

    def outputs(self, layer: Layer) -> tuple[TensorSpec, ...]:
        kind = GGML_TYPES[_type(layer.scheme)]
        return (TensorSpec("weight", "U8", (layer.shape[0], layer.shape[1] // kind.weights * kind.nbytes)),)

    def pack(self, layer: Layer, weight: QuantizedTensor) -> dict[str, Tensor]:
        from roundel.formats.gguf.block_types import BLOCK_TYPES

        packed = BLOCK_TYPES[_type(layer.scheme)].pack(weight)
        order = self._row_order(layer.tensor, len(packed))
        return {"weight": packed if order is None else packed[order]}

    def unpack(self, layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
        import torch

        from roundel.formats.gguf.block_types import BLOCK_TYPES

        kind, packed = BLOCK_TYPES[_type(layer.stored.scheme or layer.scheme)], stored["weight"]
        order = self._row_order(layer.tensor, len(packed))
        return kind.unpack(packed if order is None else packed[torch.argsort(order)].contiguous())

    def kept(self, spec: TensorSpec) -> TensorSpec | None:
        name = self._named(spec.name)
        if name is None:
            reason = left_out(spec.name, self._settings, self._architecture)
            if reason is None:
                raise PlanError(f"llama.cpp's {self._architecture} has no tensor for {spec.name} {list(spec.shape)}.")
            return None
        dtype = "F32" if is_float32(name, spec.shape) else self.floats
        return spec if dtype is None else replace(spec, dtype=dtype)

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        offset, order = norm_offset(name, self._architecture), self._row_order(name, len(tensor))
        if order is not None:
            tensor = tensor[order]
        return tensor.float() + offset if offset else tensor

    def rows_together(self, tensor: str) -> int:
        permuted = rows_permuted(tensor, self._settings, self._architecture)
        return 1 if permuted is None else permuted[1]

    def name_of(self, tensor: str, config: Mapping[str, object]) -> str | None:
        try:
            settings, known = settings_of(config), architecture_of(config)
        except SourceError:
            return tensor
        return None if left_out(tensor, settings, known) is not None else text_name(tensor)

    def extras(self) -> Mapping[str, Tensor]:
        return extra_tensors(self._settings, self._architecture)

    def lay_out(
        self, specs: Sequence[TensorSpec], layers: Sequence[Layer], shard_bytes: int, stacks: Stacks
    ) -> tuple[ShardLayout, ...]:
        assert self.model is not None
        rounded = {layer.tensor: layer for layer in layers}
        whole: dict[str, GgufTensor] = {}
        members: dict[str, list[TensorSpec]] = {}
        for spec in specs:
            layer, name = rounded.get(spec.name), self._named(spec.name) or spec.name
            kind, shape = (_type(layer.scheme), layer.shape) if layer is not None else (spec.dtype, spec.shape)
            members.setdefault(name, []).append(spec)
            stack = () if expert_of(spec.name) is None else (len(members[name]),)
            whole[name] = GgufTensor(name, kind, (*stack, *self._stored_shape(spec.name.rpartition(".")[0], shape)))
        tensors = list(whole.values())
        kind = self.mixture or next((m for m in FILE_TYPES if layers and m == _type(layers[0].scheme).lower()), "f16")
        told = metadata(self.model.config, self.model.folder, FILE_TYPES[kind], self.model.name, tensors)
        stem = self.model.name.rpartition("/")[2] or "model"
        layout = lay_out_gguf(f"{stem}-{kind.upper()}.gguf", told.values, tensors)
        places = {
            spec.name: _part(layout.places[name], spec, expert_of(spec.name) or 0)
            for name, parts in members.items()
            for spec in parts
        }
        return (replace(layout, places=places),)

    def config(self, contents: Contents) -> dict[str, object]:
        return {
            "quant_method": "gguf",
            "types": {layer.name: _type(layer.scheme) for layer in contents.layers},
            "provider": "roundel",
        }

    def recognize(self, quantization: Mapping[str, object]) -> Format | None:
        return Gguf(quantization=quantization) if quantization.get("quant_method") == "gguf" else None

    def find(self, module: str, parts: Mapping[str, TensorSpec]) -> Found | None:
        kind = self.quantization.get("types", {}).get(module)
        if kind is None or "weight" not in parts:
            return None
        if f"{PREFIX}{kind}" not in PRESETS or parts["weight"].dtype != "U8" or len(parts["weight"].shape) != 2:
            raise SourceError(f"{module} is said to be {kind}, and its tensor is not. Write the checkpoint again.")
        out, row = parts["weight"].shape
        width = row // GGML_TYPES[kind].nbytes * GGML_TYPES[kind].weights
        return Found(shape=(out, width), scheme=PRESETS[PREFIX + kind], parts=("weight",))

    @cached_property
    def _settings(self) -> dict[str, Any]:
        assert self.model is not None
        return settings_of(self.model.config)

    @cached_property
    def _architecture(self) -> str:
        assert self.model is not None
        return architecture_of(self.model.config)

    def _named(self, tensor: str) -> str | None:
        if left_out(tensor, self._settings, self._architecture) is not None:
            return None
        return tensor_name(tensor, self._architecture)

    def _stored_shape(self, module: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a module's weight: with the heads as an axis of their own where it is stored by heads."""
        if self._architecture != "deepseek2" or not is_latent(module):
            return shape
        cut = latent_cuts(module, self._settings)[module]
        return (cut.heads, shape[0] // cut.heads, *shape[1:])

    def _row_order(self, tensor: str, rows: int) -> Tensor | None:
        """Of so many of a tensor's rows, whole heads."""
        import torch

        if self.model is None or (size := self.rows_together(tensor)) == 1:
            return None
        if rows % size:
            raise SourceError(f"{tensor} has {rows} rows, no whole heads of {size}. Fetch config.json again.")
        return torch.from_numpy(row_order(rows // size, size))


def gguf_variant(mixture: str) -> Format:
    """`gguf:MIXTURE`. Raises RecipeError for a mixture that is not known."""
    from roundel.formats.gguf.mixtures import mixture as known

    found = known(mixture)
    own = {"name": f"gguf:{found.name}", "mixture": found.name, "floats": found.type if found.is_float else None}
    variant: Format = type(f"Gguf_{found.name}", (Gguf,), own)()
    return variant


def _type(scheme: Scheme) -> str:
    return scheme.name.removeprefix(PREFIX)


def _part(place: Place, spec: TensorSpec, index: int) -> Place:
    """The place of a tensor, or of one expert's part of it."""
    begin = place.begin + index * spec.nbytes
    return Place(spec, begin, begin + spec.nbytes)
