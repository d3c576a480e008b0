"""The loop: every piece of work of a plan is read, rounded, packed, written, and committed to the journal.

Pieces are independent while no algorithm reads activations, so N workers take them from a queue; positions are known,
so files are equal whatever the order. A committer flushes finished bytes in the background and then journals them.
Devices are chosen here and nowhere else.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from roundel.algorithms import Algorithm, Rounded, Rtn
from roundel.calibrated import Units
from roundel.calibrating import Calibration
from roundel.checkpoint import Checkpoint
from roundel.committer import Committer
from roundel.converting import Beside, convert_layer, inexact
from roundel.errors import NumericsError
from roundel.fusion import Errors, fuses, goes_by_rows, round_and_pack
from roundel.interruption import Interruption
from roundel.io.journal import Journal
from roundel.io.safetensors import Shard
from roundel.matrices import (
    Demoted,
    as_bytes,
    errors_in,
    errors_in_floats,
    errors_of,
    finite,
    holds,
    largest,
    slabs,
    sound,
)
from roundel.memory import free_memory
from roundel.output import clear, finish, is_intact, open_shards
from roundel.parts import round_part
from roundel.planning import Copy, Plan, Work
from roundel.planning.room import expected_peak
from roundel.regrid import regrid
from roundel.report import Progress, Report, Row, became, converted_row, decoded_row, row_of
from roundel.tensor import TensorSpec, torch_dtype
from roundel.unit import Layer, Unit

if TYPE_CHECKING:
    from torch import Tensor


__all__ = ["Demoted", "default_workers", "run"]


def default_workers(plan: Plan, device: str = "cpu") -> int:
    """As many as there are cores, while their memory fits in half of what is free."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = free_memory() // 2
    workers = max(1, cores if device == "cpu" else 2)
    while workers > 1 and expected_peak(plan, workers, device) > free:
        workers -= 1
    return workers


def run(
    plan: Plan,
    checkpoint: Checkpoint,
    out: Path,
    workers: int = 1,
    device: str = "cpu",
    progress: Progress | None = None,
    calibration: Calibration | None = None,
) -> Report:
    """Carry out a plan. Safe to call again after a crash: finished work is skipped.

    calibration   what the plan's algorithm looks at; needed where it reads activations
    Raises Demoted when weights are not finite, after all of the model was looked at, and KeyboardInterrupt: after one
    Ctrl-C at the end of the work at hand, after the second at once.
    """
    started = time.perf_counter()
    with Interruption() as interruption:
        journal = _journal(out, plan)
        resumed = len(journal.finished)
        if progress is not None:
            for work in plan.works:
                if work.name in journal.finished:
                    progress(work, Row.from_dict(journal.finished[work.name]))
        shards = open_shards(out, plan)
        opened = tuple({id(s): s for by_tensor in shards for s in by_tensor.values()}.values())
        try:
            _put_extras(plan, shards)
            committer = Committer(journal, opened)
            loop = _loop(plan, checkpoint, shards, device, committer, progress, interruption)
            try:
                loop.go([w for w in plan.works if w.kind != "unit" and w.name not in journal.finished], workers)
            finally:
                committer.close()
            if loop.bad:
                raise Demoted({w.name: loop.bad[w.name] for w in plan.works if w.name in loop.bad})
            if calibration is not None:
                units = Units(plan, checkpoint, out, shards, journal, calibration, device, free_memory(), progress)
                units.run(interruption)
        except BaseException:
            for shard in opened:
                shard.close()
            journal.close()
            raise
        for shard in opened:
            shard.finish()
        rows = tuple(r for w in plan.works for r in Row.from_dict(journal.finished[w.name]).flat())
        journal.close()
        report = Report(plan=plan, folder=out, rows=rows, seconds=time.perf_counter() - started, resumed=resumed)
        finish(out, plan, checkpoint.source, report)
        return report


def _journal(out: Path, plan: Plan) -> Journal:
    """What is done of the plan; of nothing, where somebody took files away that the journal speaks of."""
    identity = {**plan.identity(), "fingerprint": plan.fingerprint}
    journal = Journal(out, identity)
    if is_intact(out, plan, journal.finished):
        return journal
    journal.close()
    clear(out, plan)
    return Journal(out, identity)


def _put_extras(plan: Plan, shards: Sequence[Mapping[str, Shard]]) -> None:
    """Tensors that formats store and no source has."""
    for output, by_tensor in zip(plan.outputs, shards, strict=True):
        for name, tensor in output.format.extras().items():
            if name in by_tensor:
                by_tensor[name].put(name, as_bytes(tensor))


@dataclass
class _Loop:
    """The state that workers share."""

    plan: Plan
    checkpoint: Checkpoint
    shards: list[dict[str, Shard]]
    device: str
    committer: Committer
    progress: Progress | None
    interruption: Interruption
    algorithm: Algorithm
    outside: str | None = None  # said of every layer, where the algorithm is not the one asked for
    bad: dict[str, NumericsError] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def go(self, todo: list[Work], workers: int) -> None:
        self.left = Counter(shard for work in todo for shard in work.shards)
        self.order = list(dict.fromkeys(shard for work in todo for shard in work.shards))
        if self.order:
            self.checkpoint.source.files.prefetch(self.order[0])
        self.queue = iter(todo)
        with ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="worker") as pool:
            running = [pool.submit(self._serve) for _ in range(max(1, workers))]
            try:
                done, _ = wait(running, return_when=FIRST_EXCEPTION)
            except KeyboardInterrupt:
                self.stop.set()
                raise
            if any(future.exception() for future in done):
                self.stop.set()
        for future in running:
            future.result()
        self.interruption.stop_if_asked()

    def _serve(self) -> None:
        while not (self.stop.is_set() or self.interruption.asked.is_set()):
            with self.lock:
                work = next(self.queue, None)
            if work is None:
                return
            self._prefetch(work)
            try:
                row = self._perform(work)
            except NumericsError as error:
                with self.lock:
                    self.bad[work.name] = error
                continue
            self._drop(work)
            if not self.bad:
                self.committer.add(row)
            if self.progress is not None:
                with self.lock:
                    self.progress(work, row)

    def _prefetch(self, work: Work) -> None:
        """The shard after those this work needs may be fetched while it is done."""
        last = max((self.order.index(shard) for shard in work.shards), default=-1)
        if 0 <= last < len(self.order) - 1:
            self.checkpoint.source.files.prefetch(self.order[last + 1])

    def _drop(self, work: Work) -> None:
        with self.lock:
            self.left.subtract(work.shards)
            over = [s for s in work.shards if self.left[s] == 0]
        if over:
            self.checkpoint.source.drop(over)

    def _perform(self, work: Work) -> Row:
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


def _loop(
    plan: Plan,
    checkpoint: Checkpoint,
    shards: list[dict[str, Shard]],
    device: str,
    committer: Committer,
    progress: Progress | None,
    interruption: Interruption,
) -> _Loop:
    """The loop over what stands apart from units, where an algorithm that reads activations has none to read."""
    chain = plan.recipe.chain
    return _Loop(
        plan, checkpoint, shards, device, committer, progress, interruption,
        algorithm=Rtn() if chain.reads_activations else chain.algorithm,
        outside="outside the decoder blocks: rounded to nearest" if chain.reads_activations else None,
    )  # fmt: skip


def _to_device(tensor: Tensor, device: str) -> Tensor:
    """On an accelerator through pinned memory, so that the copy overlaps with other workers' arithmetic."""
    return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _stream(device: str):  # type: ignore[no-untyped-def]
    """Each worker's own queue on the accelerator; nothing on CPU."""
    from contextlib import nullcontext

    if not device.startswith("cuda"):
        return nullcontext()
    import torch

    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
