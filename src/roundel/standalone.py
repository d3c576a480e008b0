"""Works that stand alone: one matrix, or one tensor that stays, read, rounded and packed for every output.

They need no other work's result, so several threads may do them; what they share is locked or equal whoever wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from roundel.algorithms import Algorithm, Rounded
from roundel.checkpoint import Checkpoint
from roundel.converting import Beside, convert_layer, inexact
from roundel.fusion import Errors, fuses, goes_by_rows, round_and_pack
from roundel.io.safetensors import Shard
from roundel.matrices import as_bytes, errors_in, errors_in_floats, errors_of, finite, holds, largest, slabs, sound
from roundel.parts import round_part
from roundel.planning import Copy, Plan, Work
from roundel.regrid import regrid
from roundel.report import Row, became, converted_row, decoded_row, row_of
from roundel.tensor import TensorSpec, torch_dtype
from roundel.unit import Layer, Unit

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Standalone"]


@dataclass
class Standalone:
    """How they are done.

    shards      of each output, the open file of each tensor
    algorithm   chooses the codes; reads no activations
    outside     said of every layer, where the algorithm is not the one asked for
    """

    plan: Plan
    checkpoint: Checkpoint
    shards: Sequence[Mapping[str, Shard]]
    device: str
    algorithm: Algorithm
    outside: str | None = None
    largest: dict[str, float] = field(default_factory=dict)

    def perform(self, work: Work) -> Row:
        """Do one, but for the journal. Raises NumericsError for weights that are not finite, SourceError for parts that
        contradict each other, OutputError where the disk is full."""
        nbytes = [0] * len(self.shards)
        notes = [note for copy in work.copies if (note := self._copy(copy, nbytes)) is not None]
        if work.layer is None:
            return Row(name=work.name, kind=work.kind, nbytes=tuple(nbytes), note="; ".join(notes) or None)
        layer, formats = work.layer, [o.format for o in self.plan.outputs]
        if work.kind == "decode":
            row = self._decode(layer, nbytes, stays=True)
            return replace(row, kind=work.kind, nbytes=tuple(nbytes))
        if self.plan.recipe.conversion is not None and layer.stored.scheme is not None:
            row = self._convert(layer, work.beside, nbytes)
            return replace(row, kind=work.kind, nbytes=tuple(nbytes))
        if fuses(layer, formats, self.algorithm, self.device):
            piece, source = layer.stored.parts["weight"], self.checkpoint.source
            parts, errors = round_and_pack(layer, formats[0], lambda start, into: source.read_rows(piece, start, into))
            self._put(
                {f"{layer.name}.{part}": array.data.cast("B") if array.size else b"" for part, array in parts.items()},
                nbytes,
                0,
            )
            row = self._row(layer, None, errors)
        elif goes_by_rows(layer, formats, self.algorithm, self.device):
            row = self._round_rows(layer, nbytes)
        else:
            row = self._round(layer, work.beside, nbytes)
        return replace(row, kind=work.kind, nbytes=tuple(nbytes))

    def _row(self, layer: Layer, rounded: Rounded | None, errors: Errors) -> Row:
        """The row of a layer that was rounded; in a conversion, of one that was not quantized before."""
        if self.plan.recipe.conversion is None:
            return row_of(layer, rounded, errors, self.outside)
        return replace(converted_row(layer, rounded, errors), note=f"rounded, and was {layer.dtype}")

    def _decode(self, layer: Layer, nbytes: list[int], *, stays: bool) -> Row:
        """A packed matrix as floats. In a conversion these must hold what it decodes to, or the loss is told.

        stays   whether it has no scheme in the plan
        """
        weight, conversion = self.checkpoint.weights(layer), self.plan.recipe.conversion
        spec, format = TensorSpec(layer.tensor, layer.dtype, layer.shape), self.plan.outputs[0].format
        for number in range(len(self.shards)):
            self._keep(number, spec, weight, nbytes)
        dtype = (format.kept(spec) or spec).dtype
        if conversion is None:
            return Row(name=layer.name, kind="decode")
        errors = errors_of(weight, weight.to(torch_dtype(dtype)).float())
        if errors.noise and conversion == "exact" and format.keeps_codes:
            raise inexact(layer, f"it becomes {dtype}, which does not hold its numbers", format)
        return decoded_row(layer, dtype, errors) if stays else converted_row(layer, None, errors)

    def _convert(self, layer: Layer, beside: Sequence[Layer], nbytes: list[int]) -> Row:
        """A quantized layer to another format."""
        format = self.plan.outputs[0].format
        if not format.keeps_codes:
            return self._decode(layer, nbytes, stays=False)
        stored, reader = self.checkpoint.unpack(layer), self.checkpoint.reader
        assert reader is not None
        weight = layer.stored.part(reader.decode(stored))
        algorithm = self.algorithm if self.plan.recipe.conversion == "requantize" else None
        read = ((each, self.checkpoint.unpack(each)) for each in beside)
        others = (Beside(each, found, reader.decode(found)) for each, found in read)
        rounded = convert_layer(layer, stored, weight, format, algorithm, others)
        parts = format.pack(layer, rounded.tensor)
        self._put({f"{layer.name}.{part}": as_bytes(tensor) for part, tensor in parts.items()}, nbytes, 0)
        return converted_row(layer, rounded, errors_in(weight, rounded.tensor, format.decode))

    def _round(self, layer: Layer, beside: Sequence[Layer], nbytes: list[int]) -> Row:
        """The general way: any source, any algorithm, any device, several formats."""
        with _stream(self.device):
            weight, rounded = self._quantize(layer, beside)
            for number, output in enumerate(self.plan.outputs):
                parts = output.format.pack(layer, rounded.tensor)
                self._put({f"{layer.name}.{part}": as_bytes(tensor) for part, tensor in parts.items()}, nbytes, number)
            errors = errors_in(weight, rounded.tensor, self.plan.outputs[0].format.decode)
            return self._row(layer, rounded, errors)

    def _round_rows(self, layer: Layer, nbytes: list[int]) -> Row:
        """The same where rows do not depend on each other: a slab of them at a time, so that no matrix is held."""
        formats, lost, rounded = [output.format for output in self.plan.outputs], Errors(0.0, 0.0), None
        together = math.lcm(*(format.rows_together(layer.tensor) for format in formats))
        for start, weight in slabs(self.checkpoint, layer.stored.parts["weight"], together):
            part = replace(layer, shape=(weight.shape[0], weight.shape[1]))
            rounded = self._rounded(part, finite(layer, weight, start), (), start)
            for number, format in enumerate(formats):
                for name, tensor in format.pack(part, rounded.tensor).items():
                    data = as_bytes(tensor)
                    self._put({f"{layer.name}.{name}": data}, nbytes, number, start * (len(data) // len(weight)))
            lost = lost.plus(errors_in(weight, rounded.tensor, formats[0].decode))
        return self._row(layer, rounded, lost)

    def _quantize(self, layer: Layer, beside: Sequence[Layer]) -> tuple[Tensor, Rounded]:
        grid = layer.scheme.weight
        if layer.moves and not beside:  # what is stacked with others shares their float, whatever it had before
            moved = regrid(self.checkpoint.unpack(layer), grid)
            if not isinstance(moved, str) and (moved.group_index is None or layer.permuted):
                return finite(layer, moved.decode()), Rounded(tensor=moved)  # nothing to round
        weight = finite(layer, _to_device(self.checkpoint.weights(layer), self.device))
        return weight, self._rounded(layer, weight, beside)

    def _rounded(self, layer: Layer, weight: Tensor, beside: Sequence[Layer], start: int = 0) -> Rounded:
        """A layer as the algorithm rounds it, or its rows from `start` on."""
        reach = {layer.name: max(map(self._largest, beside))} if beside else {}
        told = self.plan.importances
        if layer.cut is not None:
            rounded = round_part(self.algorithm, layer, weight, told.of_heads(layer) if told is not None else ())
            return sound(layer, weight, rounded, strict=self.plan.recipe.strict, start=start)
        seen = told.of(layer) if told is not None else None
        known = {} if seen is None else {layer.name: seen}
        unit = Unit(name=layer.name, layers=(layer,), weights={layer.tensor: weight}, reach=reach, known=known)
        rounded = self.algorithm.quantize(unit)[layer.name]
        return sound(layer, weight, rounded, strict=self.plan.recipe.strict, start=start)

    def _largest(self, layer: Layer) -> float:
        """The largest weight of a layer that is rounded elsewhere."""
        if layer.name not in self.largest:
            self.largest[layer.name] = largest(self.checkpoint.weights(layer))
        return self.largest[layer.name]

    def _copy(self, copy: Copy, nbytes: list[int]) -> str | None:
        """A tensor that stays. Returns what to say of it, where a format stores it in a dtype that does not hold it."""
        outputs = list(enumerate(self.plan.outputs))
        as_it_is = [number for number, output in outputs if output.format.copies and copy.piece.is_whole]
        for number in as_it_is:
            descriptor, begin = self.checkpoint.source.place(copy.piece.tensor)
            self.shards[number][copy.spec.name].copy(copy.spec.name, descriptor, begin)
            nbytes[number] += copy.spec.nbytes
        notes = [self._restate(number, copy, nbytes) for number, _ in outputs if number not in as_it_is]
        return next((note for note in notes if note is not None), None)

    def _restate(self, number: int, copy: Copy, nbytes: list[int]) -> str | None:
        """A tensor that stays, in a format that has it in another dtype or order, a slab of rows at a time."""
        spec, format = copy.spec, self.plan.outputs[number].format
        kept, lost = format.kept(spec), Errors(0.0, 0.0)
        if kept is None:
            return None
        for start, rows in slabs(self.checkpoint, copy.piece, format.rows_together(spec.name)):
            self._keep(number, spec, rows, nbytes, start)
            if not holds(kept.dtype, spec.dtype):
                lost = lost.plus(errors_in_floats(spec, rows, kept.dtype, format.name))
        if lost.noise and self.plan.recipe.conversion == "exact":
            raise inexact(spec, f"it becomes {kept.dtype}, which does not hold its numbers", format)
        return became(kept.dtype, lost)

    def _keep(self, number: int, spec: TensorSpec, tensor: Tensor, nbytes: list[int], start: int = 0) -> None:
        """A tensor that stays, or its rows from `start` on, as a format stores it."""
        format = self.plan.outputs[number].format
        kept = format.kept(spec)
        if kept is not None:
            data = as_bytes(format.keep(spec.name, tensor), kept.dtype)
            self._put({spec.name: data}, nbytes, number, start * (kept.nbytes // max(1, math.prod(kept.shape[:1]))))

    def _put(
        self, tensors: dict[str, memoryview | bytes], nbytes: list[int], only: int | None = None, offset: int = 0
    ) -> None:
        for number, by_tensor in enumerate(self.shards):
            if only is None or only == number:
                for name, data in tensors.items():
                    by_tensor[name].put(name, data, offset)
                    nbytes[number] += len(data)


def _to_device(tensor: Tensor, device: str) -> Tensor:
    """On an accelerator through pinned memory, so that the copy overlaps with other workers' arithmetic."""
    return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _stream(device: str) -> AbstractContextManager[object]:
    """Each worker's own queue on the accelerator; nothing on CPU."""
    if not device.startswith("cuda"):
        return nullcontext()
    import torch

    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
