"""The part of the loop that looks at data: decoder blocks one after the other, the activations travelling with them.

For each unit: read it, transform it, choose its codes, write them, and let the rounded block compute what enters the
next. Bytes, then activations, then the journal's line: a killed run continues at the unit it was in.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from roundel.calibrating import Calibration
from roundel.checkpoint import Checkpoint
from roundel.errors import NumericsError, PlanError
from roundel.importance import ImatrixWriter
from roundel.interruption import Interruption
from roundel.io.journal import Journal
from roundel.io.safetensors import Shard
from roundel.io.source import LocalFiles
from roundel.matrices import Demoted, as_bytes, check_scales, errors_in, finite, reaches, sound
from roundel.memory import give_back, peak_memory
from roundel.output import FRONTIER
from roundel.parts import with_parts
from roundel.planning import Plan, Work
from roundel.planning.room import frontier_bytes, in_memory, part_of
from roundel.report import LOG, Progress, Row, row_of
from roundel.tensor import TensorSpec
from roundel.unit import Decodable, Layer, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from roundel.algorithms import Rounded
    from roundel.calibration.activations import BlockActivations, Frontier
    from roundel.calibration.block import Block, Blocks
    from roundel.calibration.skeleton import Skeleton

__all__ = ["Units"]


class Units:
    """The units of a plan, and what all of them share."""

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        out: Path,
        shards: Sequence[Mapping[str, Shard]],
        journal: Journal,
        calibration: Calibration,
        device: str,
        free_memory: int,
        progress: Progress | None,
    ) -> None:
        self.plan, self.checkpoint, self.out, self.shards, self.journal = plan, checkpoint, out, shards, journal
        self.calibration, self.device, self.progress = calibration, device, progress
        self.recipe, self.chain, self.free_memory = plan.recipe, plan.recipe.chain, free_memory
        self.samples, self.tokens = (int(size) for size in calibration.tokens.shape)
        self.importances: ImatrixWriter | None = None

    def run(self, interruption: Interruption) -> None:
        """Do those that the journal does not have, in order.

        Raises PlanError when the model cannot be run block by block, NumericsError for weights or activations that are
        not finite, OutputError when the disk is full, KeyboardInterrupt at a unit's end where it was asked for.
        """
        import torch

        units = [work for work in self.plan.works if work.kind == "unit"]
        todo = [work for work in units if work.name not in self.journal.finished]
        # Learning needs gradients, whatever the caller has switched off.
        with torch.inference_mode(False), torch.enable_grad(), ExitStack() as held:
            if self.calibration.importances_to is not None:
                self.importances = ImatrixWriter(
                    self.calibration.importances_to,
                    self.config,
                    [layer for work in units for layer in work.layers if layer.cut is None],
                    dataset=self.recipe.dataset,
                    samples=self.samples,
                    tokens=self.tokens,
                    begun=len(todo) < len(units),
                )
                held.callback(self.importances.close)
            if todo:
                self._prepare()
                held.callback(self.streams.close)
                self._go(units, todo, interruption)
            if self.importances is not None:
                self.importances.finish()

    def _prepare(self) -> None:
        import torch

        from roundel.calibration.skeleton import Skeleton
        from roundel.calibration.streams import Streams

        checkpoint, calibration = self.checkpoint, self.calibration
        self.skeleton: Skeleton = Skeleton.of(
            checkpoint, device=self.device, trust_remote_code=calibration.trust_remote_code
        )
        self.blocks: dict[str, Block] = {b.name: b for b in (*self.skeleton.blocks, self.skeleton.tail)}
        needed = frontier_bytes(self.plan, self.skeleton.hidden, self.samples, self.tokens)
        self.streams = Streams(
            self.skeleton,
            calibration.tokens,
            self.out,
            FRONTIER,
            dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[self.recipe.activation_dtype],
            in_memory=in_memory(calibration.offload, needed, self.free_memory),
            apart=self.chain.reads_float_stream,
            part=part_of(self.recipe, self.tokens, self.device),
            device=self.device,
        )

    def _go(self, units: Sequence[Work], todo: Sequence[Work], interruption: Interruption) -> None:
        for work in todo:
            missing = next((name for name in work.blocks if name not in self.blocks), None)
            if missing is not None:
                raise PlanError(
                    f"{missing} is not among the blocks that transformers' {self.plan.family} runs "
                    f"({', '.join(list(self.blocks)[:2])} ...). Choose an algorithm that looks at no data, such as "
                    "opt-rtn."
                )
        if len(todo) == len(units) and isinstance(self.checkpoint.source.files, LocalFiles):
            self._look_at_weights(todo)
        names = [work.name for work in units]
        weights = {name: self._float(self.checkpoint.tensor(name)) for name in self.skeleton.entry_tensors}
        begin = self.streams.enter if len(todo) == len(units) else self.streams.resume
        streams = begin(todo[0].name, weights)
        del weights
        after: dict[str, str | None] = dict(zip(names, [*names[1:], None], strict=True))
        for work in todo:
            streams = self._unit(work, streams, after[work.name])
            interruption.stop_if_asked()

    def _look_at_weights(self, todo: Sequence[Work]) -> None:
        """Read all weights once: what cannot be rounded shows before hours are spent. Raises Demoted."""
        bad: dict[str, NumericsError] = {}
        for layer in (layer for work in todo for layer in work.layers):
            try:
                check_scales(layer, finite(layer, self.checkpoint.weights(layer)))
            except NumericsError as error:
                bad[layer.name] = error
        if bad:
            raise Demoted(bad)

    def _unit(self, work: Work, streams: dict[str, Frontier], following: str | None) -> dict[str, Frontier]:
        from roundel.calibration.input_scales import with_input_scales

        started = time.perf_counter()
        block = self._block(work)
        is_last = following is None
        weights = self._weights(work, block)
        behind: dict[str, Frontier] = {}
        if self.chain.reads_float_stream and block is not self.skeleton.tail:  # the target, even where nothing follows
            behind["float"] = self.streams.frontier(following or f"{work.name}.behind", "float")
            self.streams.advance(block, weights, streams["float"], behind["float"])
        unit, notes = self._transformed(self._make(work, block, weights, streams, behind))
        unit = replace(unit, reach=reaches(unit.layers, unit.weights))
        file = self.plan.importances
        parts = tuple(layer for layer in work.layers if layer.cut is not None)
        unit, apart = with_parts(unit, parts, file.of_heads if file is not None else lambda layer: ())
        rounded = with_input_scales(unit, self.chain.algorithm.quantize(unit)) | apart
        weights |= {layer.tensor: _weight(replace(unit, weights=weights), layer) for layer in parts}
        give_back()
        for layer in work.layers:
            entered = rounded[layer.name].inputs
            if self.importances is not None and entered is not None and entered.tokens:
                self.importances.put(layer, entered.mean_square, entered.tokens)
        row = self._write(work, unit, weights, rounded, notes, self._cached(work, block, unit, streams["quantized"]))
        seconds = time.perf_counter() - started
        if not is_last:
            behind["quantized"] = self.streams.frontier(following or "", "quantized")
            found: dict[str, Tensor | Decodable] = dict(unit.weights)
            found |= {layer.tensor: rounded[layer.name].tensor for layer in unit.layers}
            del unit, weights, rounded
            give_back()
            self.streams.advance(block, found, streams["quantized"], behind["quantized"])
            del found
            behind.setdefault("float", behind["quantized"])
            for frontier in set(behind.values()):
                frontier.save()
        self._commit(work, row)
        for frontier in {*streams.values(), *(behind.values() if is_last else ())}:
            frontier.close(delete=True)
        self._log(row, seconds)
        if self.progress is not None:
            self.progress(work, row)
        return behind

    def _cached(self, work: Work, block: Block | Blocks, unit: Unit, entering: Frontier) -> dict[str, Tensor]:
        """Scales of the keys and values of a unit's attention, by tensor name."""
        from roundel.calibration.cache_scales import cache_scales

        if not work.caches:
            return {}
        return cache_scales(block, work.caches, self.streams.states(entering), unit.weights)

    def _transformed(self, unit: Unit) -> tuple[Unit, list[str]]:
        notes: list[str] = []
        for transform in self.chain.transforms:
            found = transform.apply(unit)
            unit = found.unit
            notes += [f"{transform.name}: {name}: {text}" for name, text in found.notes.items()]
        return unit, notes

    def _block(self, work: Work) -> Block | Blocks:
        from roundel.calibration.block import Blocks

        several = [self.blocks[name] for name in work.blocks]
        return several[0] if len(several) == 1 else Blocks(work.name, several)

    def _weights(self, work: Work, block: Block | Blocks) -> dict[str, Tensor]:
        """All tensors of a unit by name: matrices as they are stored, what stays as float32. Raises NumericsError for
        weights that are not finite."""
        weights: dict[str, Tensor] = {}
        for layer in (each for each in (*work.layers, *work.decodes) if each.cut is None):
            weights[layer.tensor] = finite(layer, self.checkpoint.weights(layer)).to(self.device)
        for copy in work.copies:
            weights[copy.spec.name] = self._float(self.checkpoint.read_piece(copy.piece))
        for name in block.tensors:
            if name not in weights:
                weights[name] = self._float(self.checkpoint.tensor(name))
        return weights

    def _make(
        self,
        work: Work,
        block: Block | Blocks,
        weights: Mapping[str, Tensor],
        streams: Mapping[str, Frontier],
        behind: Mapping[str, Frontier],
    ) -> Unit:
        from roundel.calibration.activations import BlockActivations
        from roundel.families.spaces import spaces_of

        layers = tuple(layer for layer in work.layers if layer.cut is None)
        seen = {**streams, **({"target": behind["float"]} if "float" in behind else {})}
        entering: BlockActivations = BlockActivations(
            block=block,
            own=weights,
            layers=tuple(layer.name for layer in layers),
            streams=seen,
            samples=self.samples,
            tokens=self.tokens,
            batch=self.recipe.together,
            part=self.streams.part,
            device=self.device,
            every_expert=self.recipe.calibrate_all_experts,
            ticker=lambda done, text: self.calibration.tick(work.name, done, text),
        )
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        inside = work.blocks if self.chain.transforms and block is not self.skeleton.tail else ()
        spaces = tuple(s for name in inside for s in spaces_of(self.checkpoint.family, name, shapes, self.config))
        file = self.plan.importances
        known = {layer.name: told for layer in layers if file is not None and (told := file.of(layer)) is not None}
        return Unit(name=work.name, layers=layers, weights=weights, spaces=spaces, activations=entering, known=known)

    @property
    def config(self) -> Mapping[str, object]:
        return self.checkpoint.source.config

    def _write(
        self,
        work: Work,
        unit: Unit,
        weights: Mapping[str, Tensor],
        rounded: dict[str, Rounded],
        notes: Sequence[str],
        cached: Mapping[str, Tensor],
    ) -> Row:
        """Pack every layer and put it to its place; what stays goes with its new numbers where a transform moved it."""
        rows: list[Row] = []
        for layer in work.layers:
            result = self._sound(layer, unit, rounded[layer.name])
            nbytes = [0] * len(self.shards)
            for number, output in enumerate(self.plan.outputs):
                for part, tensor in output.format.pack(layer, result.tensor).items():
                    nbytes[number] += self._put(number, f"{layer.name}.{part}", as_bytes(tensor))
            errors = errors_in(weights[layer.tensor], result.tensor, self.plan.outputs[0].format.decode)
            row = row_of(layer, result, errors)
            rows.append(replace(row, nbytes=tuple(nbytes)))
        kept = [0] * len(self.shards)
        for number, output in enumerate(self.plan.outputs):
            for name, scale in cached.items():
                kept[number] += self._put(number, name, as_bytes(scale))
            stay = [(TensorSpec(x.tensor, x.dtype, x.shape), _weight(unit, x)) for x in work.decodes]
            for copy in work.copies:
                now = unit.weights[copy.spec.name]
                moved = now is not weights[copy.spec.name]
                stay.append((copy.spec, now if moved else self.checkpoint.read_piece(copy.piece)))
            for spec, tensor in stay:
                stored = output.format.kept(spec)
                if stored is not None:
                    data = as_bytes(output.format.keep(spec.name, tensor), stored.dtype)
                    kept[number] += self._put(number, spec.name, data)
        note = "; ".join(notes) or None
        return Row(name=work.name, kind="unit", nbytes=tuple(kept), note=note, rows=tuple(rows))

    def _sound(self, layer: Layer, unit: Unit, rounded: Rounded) -> Rounded:
        """Raises Demoted: also of a sound matrix a transform or the algorithm itself may have made scales infinite."""
        try:
            return sound(layer, unit.weights[layer.tensor], rounded, strict=self.recipe.strict)
        except NumericsError as error:
            raise Demoted({layer.name: error}) from error

    def _put(self, number: int, name: str, data: memoryview) -> int:
        self.shards[number][name].put(name, data)
        return len(data)

    def _commit(self, work: Work, row: Row) -> None:
        for by_tensor in self.shards:
            for shard in {id(s): s for s in by_tensor.values()}.values():
                shard.flush()
        if self.importances is not None:
            self.importances.flush()
        self.journal.commit([row.to_dict()])
        for shard_name in work.shards:
            if not any(shard_name in w.shards for w in self.plan.works if w.name not in self.journal.finished):
                self.checkpoint.source.drop([shard_name])

    def _log(self, row: Row, seconds: float) -> None:
        """One line for each layer, with what differs between two runs: the time, and the most bytes of memory that the
        process has held so far."""
        with (self.out / LOG).open("a", encoding="utf-8") as file:
            for layer in row.rows:
                told = {k: v for k, v in layer.to_dict().items() if v is not None and k != "kind"}
                told |= {"algorithm": self.recipe.algorithm, "unit": row.name, "unit_seconds": round(seconds, 2)}
                told["peak_memory_bytes"] = peak_memory()
                file.write(json.dumps(told) + "\n")

    def _float(self, tensor: Tensor) -> Tensor:
        return (tensor.float() if tensor.is_floating_point() else tensor).to(self.device)


def _weight(unit: Unit, layer: Layer) -> Tensor:
    """What a matrix is in a unit; of a part, what it is of the whole."""
    cut = layer.cut
    return unit.weights[layer.tensor] if cut is None else cut.take(unit.weights[f"{cut.of}.weight"])
