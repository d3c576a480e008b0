"""A checkpoint, read: which matrices it holds, how each is stored, and its weights on request.

This is where a source's tensors become layers: companions are found (in whatever shard they lie), fused experts are
split, and each matrix learns whether it is a linear layer or why it is not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from roundel.errors import SourceError
from roundel.families import Family, FusedExperts, family_of, kept_reason, misfit
from roundel.formats import Format, reader_of
from roundel.formats.gguf.source import find_gguf, open_gguf
from roundel.io.source import Source, open_source
from roundel.matrix import JOINED, Matrix, joined
from roundel.tensor import FLOAT_DTYPES, ITEMSIZE, TensorSpec
from roundel.unit import Layer, Piece, Stored

if TYPE_CHECKING:
    from torch import Tensor

    from roundel.tensor import QuantizedTensor

__all__ = ["Checkpoint", "Matrix", "open_checkpoint"]


class Checkpoint:
    """An opened model: `matrices` by module name, in the order they lie in the files.

    wholes    the matrices as the model has them: one that the source's format stores in parts (`Format.cuts`) is one
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
        self._parts = self._cut()
        self.wholes = self._whole()

    @property
    def format_name(self) -> str:
        """The format it is quantized in; "plain" where it is not."""
        return self.reader.name if self.reader is not None else "plain"

    @property
    def is_tied(self) -> bool:
        """Whether the output head shares the embedding's tensor and has none of its own."""
        return self.family.head not in self.matrices and self.family.embedding in self.source.tensors

    def tied_head(self) -> Matrix:
        """The tied output head as a matrix of its own, read from the embedding."""
        embedding = self.matrices[self.family.embedding.removesuffix(".weight")]
        return replace(embedding, name=self.family.head, reason=None, role="head")

    def read(self, layer: Layer, mapped: bool = False) -> dict[str, Tensor]:
        """The stored parts of a layer as tensors: {part name: tensor}. mapped: as of `read_piece`."""
        return {name: self.read_piece(piece, mapped) for name, piece in layer.stored.parts.items()}

    def read_piece(self, piece: Piece, mapped: bool = False) -> Tensor:
        """A part of a tensor, as a torch tensor of the dtype it is stored in.

        mapped   a whole tensor is memory that is read when it is used, and is the file's until it is written to
        """
        import torch

        from roundel.tensor import torch_dtype

        spec = self.source.tensors[piece.tensor]
        is_mapped = mapped and spec.nbytes and piece == Piece(tensor=piece.tensor)
        raw = torch.from_numpy(self.source.mapped(piece.tensor) if is_mapped else self.source.read(piece))
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

    def mapped(self, name: str) -> Tensor:
        """`tensor`, mapped where it lies in a file as it is."""
        matrix = self.wholes.get(name.removesuffix(".weight"))
        if matrix is not None and matrix.stored.format == "plain" and name.endswith(".weight"):
            return self.read_piece(matrix.stored.parts["weight"], mapped=True)
        return self.tensor(name)

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

    def unpack(self, layer: Layer, mapped: bool = False) -> QuantizedTensor:
        """The codes and scales of a stored layer, or of all that it is cut out of. Raises SourceError when its parts
        contradict each other. mapped: as of `read_piece`; what unpacking leaves as it is stays the file's."""
        assert self.reader is not None
        cut = layer.stored.cut
        return self.reader.unpack(layer if cut is None else self.wholes[cut.of].layer(), self.read(layer, mapped))

    def weights(self, layer: Layer) -> Tensor:
        """The float weights [out, in] of a layer, however it is stored."""
        if layer.stored.format == "plain":
            return layer.stored.part(self.read(layer)["weight"])
        if layer.stored.format == JOINED:
            return self._joined(layer.name)
        assert self.reader is not None
        return layer.stored.part(self.reader.decode(self.unpack(layer)))

    def _joined(self, name: str) -> Tensor:
        """A matrix of the model that is stored in parts."""
        import torch

        from roundel.tensor import torch_dtype

        matrix = self.wholes[name]
        whole = torch.empty(matrix.shape, dtype=torch_dtype(matrix.dtype))
        for part in self._parts[name]:
            assert part.cut is not None
            part.cut.put(self.weights(part.layer()), whole)
        return whole

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names that `tensor` knows: those of a written checkpoint in which nothing is packed."""
        matrices = [m.name + ".weight" for m in self.wholes.values()]
        return (*matrices, *(m.bias[0] for m in self.wholes.values() if m.bias is not None), *self.loose)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of what `tensor` returns, without reading it. Raises SourceError when there is none."""
        found = self._named(name)
        return found.shape if isinstance(found, Matrix) else found.shape(self.source.tensors[found.tensor])

    def tensor(self, name: str) -> Tensor:
        """A tensor by the name it has in a written checkpoint: a matrix decoded and split, a bias, or a loose tensor.

        Raises SourceError when there is none.
        """
        found = self._named(name)
        return self.weights(found.layer()) if isinstance(found, Matrix) else self.read_piece(found)

    def _named(self, name: str) -> Matrix | Piece:
        """The matrix whose weight has a name in a written checkpoint, or the part of a stored tensor that has it."""
        module, _, part = name.rpartition(".")
        matrix = self.wholes.get(module)
        if matrix is None and module == self.family.head and self.is_tied:
            matrix = self.tied_head()
        if matrix is not None and part == "weight":
            return matrix
        if matrix is not None and matrix.bias is not None and matrix.bias[0] == name:
            return matrix.bias[1]
        if name not in self.source.tensors:
            raise SourceError(f"{self.source.name} has no tensor {name}, which the model needs. Fetch it again.")
        return Piece(tensor=name)

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers that are stored quantized, by module name."""
        return {m.name: m.layer() for m in self.matrices.values() if m.stored.format != "plain"}

    def decode(self, name: str) -> Tensor:
        """What a layer's codes mean, by module name: float32 [out, in], exactly."""
        layer = (self.matrices.get(name) or self.wholes[name]).layer()
        return self.weights(layer).float() if layer.stored.scheme is None else self.unpack(layer).decode()

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
        cuts = self.reader.cuts(matrix.name, self.source.config) if self.reader is not None else {}
        self.matrices[matrix.name] = self._classified(replace(matrix, cut=cuts.get(matrix.name)))

    def _cut(self) -> dict[str, tuple[Matrix, ...]]:
        """Matrices of the model -> the parts that they are stored in. Raises SourceError where one is missing."""
        found: dict[str, tuple[Matrix, ...]] = {}
        for matrix in self.matrices.values():
            if matrix.cut is None or matrix.cut.of in found:
                continue
            assert self.reader is not None
            names = self.reader.cuts(matrix.name, self.source.config)
            missing = [name for name in names if name not in self.matrices]
            if missing:
                raise SourceError(
                    f"{self.source.name} holds {matrix.name} and no {missing[0]}. Fetch the checkpoint again."
                )
            found[matrix.cut.of] = tuple(self.matrices[name] for name in names)
        return found

    def _whole(self) -> dict[str, Matrix]:
        """All matrices, parts joined. Raises SourceError where they do not fit together."""
        found: dict[str, Matrix] = {}
        for matrix in self.matrices.values():
            if matrix.cut is None:
                found[matrix.name] = matrix
            elif matrix.cut.of not in found:
                found[matrix.cut.of] = self._classified(joined(self._parts[matrix.cut.of]))
        return found

    def _classified(self, matrix: Matrix) -> Matrix:
        """The matrix, with its role and why it stays."""
        reason = kept_reason(matrix.name, self.source.config, self.family)
        role = "linear"
        if matrix.name == self.family.head:
            role = "head"
        elif re.search(self.family.experts, matrix.name + ".") and reason is None:
            role = "expert"
        return replace(matrix, reason=reason, role=role)

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
