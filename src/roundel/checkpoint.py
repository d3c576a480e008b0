"""A checkpoint, read: which matrices it holds, how each is stored, and its weights on request.

This is where a source's tensors become layers: companions are found (in whatever shard they lie), fused experts are
split, and each matrix learns whether it is a linear layer or why it is not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from roundel.errors import SourceError
from roundel.families import Family, FusedExperts, family_of, kept_reason, misfit
from roundel.formats import Format, reader_of
from roundel.formats.gguf.source import find_gguf, open_gguf
from roundel.io.source import Source, open_source
from roundel.scheme import PRESETS, Scheme
from roundel.tensor import FLOAT_DTYPES, ITEMSIZE, TensorSpec
from roundel.unit import Layer, Piece, Stored

if TYPE_CHECKING:
    from torch import Tensor

    from roundel.tensor import QuantizedTensor

__all__ = ["Checkpoint", "Matrix", "open_checkpoint"]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A 2-D weight of the checkpoint, before anyone decided what becomes of it.

    name      module name; shape [out, in]; dtype as stored ("BF16"), or what it decodes to
    stored    how it lies in the checkpoint
    bias      the bias that belongs to it: its name as it will be written, and the part of a tensor it is
    reason    why it is no linear layer to be rounded; None when it is one
    role      "expert", "head" or "linear"
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    stored: Stored
    bias: tuple[str, Piece] | None = None
    reason: str | None = None
    role: str = "linear"

    @property
    def is_split(self) -> bool:
        """Whether it is a part of a larger tensor."""
        return any(not piece.is_whole for piece in self.stored.parts.values())

    def layer(self, scheme: Scheme | None = None) -> Layer:
        """The layer, to be put on `scheme`; without one, as it is stored (a plain matrix takes a nominal scheme)."""
        found = scheme or self.stored.scheme or PRESETS["W8A16"]
        return Layer(
            name=self.name, shape=self.shape, dtype=self.dtype, scheme=found, stored=self.stored, role=self.role,
            bias=self.bias[0] if self.bias else None,
        )  # fmt: skip


class Checkpoint:
    """An opened model: `matrices` by module name, in the order they lie in the files.

    family    what its model_type says about names and experts
    reader    the format it is quantized in, or None
    loose     tensors that belong to no matrix (norms, biases of norms, buffers), in order
    dropped   tensors that mean nothing once their layer is decoded (activation scales of the source's format)
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.family: Family = family_of(source.config)
        self.reader: Format | None = reader_of(source.config)
        self.matrices: dict[str, Matrix] = {}
        self.loose: list[str] = []
        self.dropped: list[str] = []
        self._collect()

    @property
    def is_tied(self) -> bool:
        """Whether the output head shares the embedding's tensor and has none of its own."""
        return self.family.head not in self.matrices and self.family.embedding in self.source.tensors

    def tied_head(self) -> Matrix:
        """The tied output head as a matrix of its own, read from the embedding."""
        embedding = self.matrices[self.family.embedding.removesuffix(".weight")]
        return replace(embedding, name=self.family.head, reason=None, role="head")

    def read(self, layer: Layer) -> dict[str, Tensor]:
        """The stored parts of a layer as tensors: {part name: tensor}."""
        return {name: self.read_piece(piece) for name, piece in layer.stored.parts.items()}

    def read_piece(self, piece: Piece) -> Tensor:
        """A part of a tensor, as a torch tensor of the dtype it is stored in."""
        import torch

        from roundel.tensor import torch_dtype

        spec = self.source.tensors[piece.tensor]
        raw = torch.from_numpy(self.source.read(piece))
        shape = list(spec.shape[len(piece.index) :])
        if not piece.transposed and piece.step == 1 and shape:
            shape[0] = len(range(*slice(piece.start, piece.stop).indices(shape[0])))
            return raw.view(torch_dtype(spec.dtype)).reshape(shape)
        whole = raw.view(torch_dtype(spec.dtype)).reshape(shape)
        if not shape:
            return whole
        if piece.transposed:
            whole = whole.transpose(0, 1)
        return whole[piece.start : piece.stop : piece.step].contiguous()

    def read_slab(self, piece: Piece, start: int, stop: int) -> Tensor:
        """Rows of a piece `in_rows`."""
        import numpy as np
        import torch

        from roundel.tensor import torch_dtype

        spec = self.source.tensors[piece.tensor]
        shape = (stop - start, *piece.shape(spec)[1:])
        raw = np.empty(math.prod(shape) * ITEMSIZE[spec.dtype], np.uint8)
        self.source.read_rows(piece, start, raw)
        return torch.from_numpy(raw).view(torch_dtype(spec.dtype)).reshape(shape)

    def unpack(self, layer: Layer) -> QuantizedTensor:
        """A stored layer's codes and scales. Raises SourceError when its parts contradict each other."""
        assert self.reader is not None
        return self.reader.unpack(layer, self.read(layer))

    def weights(self, layer: Layer) -> Tensor:
        """The float weights [out, in] of a layer, however it is stored."""
        if layer.stored.format == "plain":
            return self.read(layer)["weight"]
        assert self.reader is not None
        return self.reader.decode(self.unpack(layer))

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names that `tensor` knows: those of a written checkpoint in which nothing is packed."""
        matrices = [m.name + ".weight" for m in self.matrices.values()]
        return (*matrices, *(m.bias[0] for m in self.matrices.values() if m.bias is not None), *self.loose)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of what `tensor` returns, without reading it."""
        module, _, part = name.rpartition(".")
        matrix = self.matrices.get(module)
        if matrix is None and module == self.family.head and self.is_tied:
            matrix = self.tied_head()
        if matrix is not None and part == "weight":
            return matrix.shape
        if matrix is not None and matrix.bias is not None and matrix.bias[0] == name:
            return matrix.bias[1].shape(self.source.tensors[matrix.bias[1].tensor])
        if name not in self.source.tensors:
            raise SourceError(f"{self.source.name} has no tensor {name}, which the model needs. Fetch it again.")
        return self.source.tensors[name].shape

    def tensor(self, name: str) -> Tensor:
        """A tensor by the name it has in a written checkpoint: a matrix decoded and split, a bias, or a loose tensor.

        Raises SourceError when there is none.
        """
        module, _, part = name.rpartition(".")
        matrix = self.matrices.get(module)
        if matrix is None and module == self.family.head and self.is_tied:
            matrix = self.tied_head()
        if matrix is not None and part == "weight":
            return self.weights(matrix.layer())
        if matrix is not None and matrix.bias is not None and matrix.bias[0] == name:
            return self.read_piece(matrix.bias[1])
        if name not in self.source.tensors:
            raise SourceError(f"{self.source.name} has no tensor {name}, which the model needs. Fetch it again.")
        return self.read_piece(Piece(tensor=name))

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers that are stored quantized, by module name."""
        return {m.name: m.layer() for m in self.matrices.values() if m.stored.format != "plain"}

    def decode(self, name: str) -> Tensor:
        """What a layer's codes mean, by module name: float32 [out, in], exactly."""
        layer = self.matrices[name].layer()
        return self.weights(layer).float() if layer.stored.format == "plain" else self.unpack(layer).decode()

    def close(self) -> None:
        self.source.close()

    def _collect(self) -> None:
        modules: dict[str, dict[str, TensorSpec]] = {}
        fused: list[tuple[FusedExperts, re.Match[str], str]] = []
        for name, spec in self.source.tensors.items():
            match = self._fused(name, spec)
            if match is not None:
                fused.append((*match, name))
            else:
                module, part = self._split_name(name)
                if module:
                    modules.setdefault(module, {})[part] = spec
                else:
                    self.loose.append(name)
        for module, parts in modules.items():
            self._add(module, parts)
        self._add_experts(fused)

    def _split_name(self, name: str) -> tuple[str, str]:
        """A tensor's module and part."""
        for part in self.reader.compound if self.reader is not None else ():
            if name.endswith("." + part):
                return name[: -len(part) - 1], part
        module, _, part = name.rpartition(".")
        return module, part

    def _add(self, module: str, parts: Mapping[str, TensorSpec]) -> None:
        prefix = module + "."
        if self.reader is not None:
            parts = self.reader.known(
                module, parts, lambda part: self.source.read(Piece(tensor=prefix + part)).tobytes()
            )
            if self._add_stack(self.reader, module, parts):
                return
        found = self.reader.find(module, parts) if self.reader is not None else None
        if found is not None and 0 in found.shape:
            raise SourceError(f"{module} is {list(found.shape)}, a matrix without weights. Fetch the checkpoint again.")
        if found is not None:
            assert self.reader is not None
            pieces = {part: Piece(tensor=prefix + part) for part in found.parts}
            stored = Stored(format=self.reader.name, scheme=found.scheme, parts=pieces, permuted=found.permuted)
            shape, dtype, used = found.shape, self._decoded_dtype(), set(found.parts)
        else:
            weight = parts.get("weight")
            if weight is not None and weight.dtype.startswith("F8_"):
                raise SourceError(
                    f"{prefix}weight is {weight.dtype} and config.json does not say how it is scaled. Fetch "
                    "config.json again, with its quantization_config."
                )
            if weight is None or len(weight.shape) != 2 or weight.dtype not in FLOAT_DTYPES or 0 in weight.shape:
                self.loose.extend(prefix + part for part in parts)
                return
            stored = Stored(parts={"weight": Piece(tensor=prefix + "weight")})
            shape, dtype, used = (weight.shape[0], weight.shape[1]), weight.dtype, {"weight"}
        bias = None
        if "bias" in parts:
            bias = (prefix + "bias", Piece(tensor=prefix + "bias"))
            used.add("bias")
        rest = [prefix + part for part in parts if part not in used]
        (self.dropped if found is not None else self.loose).extend(rest)
        self._put(Matrix(name=module, shape=shape, dtype=dtype, stored=stored, bias=bias))

    def _add_stack(self, reader: Format, module: str, parts: Mapping[str, TensorSpec]) -> bool:
        """Experts that lie in one tensor [experts, ...] as a matrix each; whether this module holds such."""
        template = reader.unstacked(module)
        counts = {spec.shape[0] for spec in parts.values() if len(spec.shape) == 3}
        if template is None or len(counts) != 1:
            return False
        members = {part: replace(spec, shape=spec.shape[1:]) for part, spec in parts.items() if len(spec.shape) == 3}
        found = reader.find(module, members)
        if found is None or 0 in found.shape:
            return False
        bias = "bias" in parts and len(parts["bias"].shape) == 2
        for expert in range(counts.pop()):
            name = template.format(index=expert)
            pieces = {part: Piece(tensor=f"{module}.{part}", index=(expert,)) for part in found.parts}
            stored = Stored(format=reader.name, scheme=found.scheme, parts=pieces)
            bias_of = (f"{name}.bias", Piece(tensor=f"{module}.bias", index=(expert,))) if bias else None
            self._put(Matrix(name=name, shape=found.shape, dtype=self._decoded_dtype(), stored=stored, bias=bias_of))
        return True

    def _put(self, matrix: Matrix) -> None:
        reason = kept_reason(matrix.name, self.source.config, self.family)
        role = "linear"
        if matrix.name == self.family.head:
            role = "head"
        elif re.search(self.family.experts, matrix.name + ".") and reason is None:
            role = "expert"
        self.matrices[matrix.name] = replace(matrix, reason=reason, role=role)

    def _fused(self, name: str, spec: TensorSpec) -> tuple[FusedExperts, re.Match[str]] | None:
        for rule in self.family.fused_experts:
            match = re.fullmatch(rule.tensor, name)
            whole = rule.part != "weight" or spec.dtype in FLOAT_DTYPES
            if match is not None and whole and len(spec.shape) >= (2 if rule.part == "bias" else 3):
                return rule, match
        return None

    def _add_experts(self, fused: list[tuple[FusedExperts, re.Match[str], str]]) -> None:
        """Fused tensors -> one matrix for each expert and projection, companions and biases joined to it."""
        parts: dict[str, dict[str, Piece]] = {}
        for rule, match, tensor in fused:
            for module, piece in _split(rule, match["block"], tensor, self.source.tensors[tensor], self.source.config):
                parts.setdefault(module, {})[rule.part] = piece
        for module, pieces in parts.items():
            bias = pieces.pop("bias", None)
            bias_of = (f"{module}.bias", bias) if bias is not None else None
            if "weight" in pieces:
                spec = self.source.tensors[pieces["weight"].tensor]
                out, width = pieces["weight"].shape(spec)
                stored, dtype = Stored(parts=pieces), spec.dtype
            elif "blocks" in pieces and "scales" in pieces and self.reader is not None:
                stored_as = {n: self.source.tensors[p.tensor] for n, p in pieces.items()}
                specs = {n: TensorSpec(n, stored_as[n].dtype, p.shape(stored_as[n])) for n, p in pieces.items()}
                found = self.reader.find(module, specs)
                if found is None:
                    raise SourceError(f"{module}: its blocks and scales are not a layer of format {self.reader.name}.")
                (out, width), dtype = found.shape, self._decoded_dtype()
                stored = Stored(format=self.reader.name, scheme=found.scheme, parts=pieces)
            else:
                raise SourceError(
                    f"{module} has {' and '.join(pieces) or 'a bias'} without its companions. Fetch the checkpoint "
                    f"again."
                )
            self._put(Matrix(name=module, shape=(out, width), dtype=dtype, stored=stored, bias=bias_of))

    def _decoded_dtype(self) -> str:
        """The float dtype that packed layers decode to: the config's."""
        config = self.source.config
        name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        return {"float16": "F16", "float32": "F32"}.get(name, "BF16")


def _split(
    rule: FusedExperts, block: str, tensor: str, spec: TensorSpec, config: Mapping[str, object]
) -> Iterator[tuple[str, Piece]]:
    reason = misfit(rule, spec.shape, config)
    if reason is not None:
        raise SourceError(f"{tensor}: {reason}. Save the model again with the transformers release it was made for.")
    experts, count = spec.shape[0], len(rule.projections)
    rows = spec.shape[2] if rule.transposed else spec.shape[1]
    each = rows // count
    for expert in range(experts):
        for place, projection in enumerate(rule.projections):
            module = rule.into.format(block=block, expert=expert, projection=projection)
            at = Piece(tensor=tensor, index=(expert,), transposed=rule.transposed)
            if count == 1:
                yield module, at
            elif rule.interleaved:
                yield module, replace(at, start=place, step=count)
            else:
                yield module, replace(at, start=place * each, stop=(place + 1) * each)


def open_checkpoint(model: str | Path, revision: str | None = None, work: Path | None = None) -> Checkpoint:
    """Open a folder, a GGUF file or a Hub id. Raises SourceError when it is broken, unfinished or out of reach."""
    gguf = find_gguf(model)
    source = open_gguf(gguf) if gguf is not None else open_source(model, revision, work)
    try:
        return Checkpoint(source)
    except BaseException:
        source.close()
        raise
