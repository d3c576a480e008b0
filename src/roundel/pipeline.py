"""The loop: every piece of work of a plan is read, rounded, packed, written, and committed to the journal.

Pieces are independent while no algorithm reads activations, so N workers take them from a queue; positions are known,
so files are equal whatever the order. A committer flushes finished bytes in the background and then journals them.
Devices are chosen here and nowhere else.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from roundel.algorithms import Rtn
from roundel.calibrated import Units
from roundel.calibrating import Calibration
from roundel.checkpoint import Checkpoint
from roundel.committer import Committer
from roundel.errors import NumericsError
from roundel.interruption import Interruption
from roundel.io.journal import Journal
from roundel.io.safetensors import Shard
from roundel.matrices import (
    Demoted,
    as_bytes,
)
from roundel.memory import free_memory
from roundel.output import clear, finish, is_intact, open_shards
from roundel.planning import Plan, Work
from roundel.planning.room import expected_peak
from roundel.report import Progress, Report, Row
from roundel.standalone import Standalone

if TYPE_CHECKING:
    pass


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
            loop = _Loop(_standalone(plan, checkpoint, shards, device), committer, progress, interruption)
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

    pieces: Standalone
    committer: Committer
    progress: Progress | None
    interruption: Interruption
    bad: dict[str, NumericsError] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def go(self, todo: list[Work], workers: int) -> None:
        self.left = Counter(shard for work in todo for shard in work.shards)
        self.order = list(dict.fromkeys(shard for work in todo for shard in work.shards))
        if self.order:
            self.pieces.checkpoint.source.files.prefetch(self.order[0])
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
                row = self.pieces.perform(work)
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
            self.pieces.checkpoint.source.files.prefetch(self.order[last + 1])

    def _drop(self, work: Work) -> None:
        with self.lock:
            self.left.subtract(work.shards)
            over = [s for s in work.shards if self.left[s] == 0]
        if over:
            self.pieces.checkpoint.source.drop(over)


def _standalone(plan: Plan, checkpoint: Checkpoint, shards: Sequence[Mapping[str, Shard]], device: str) -> Standalone:
    """Outside of units, an algorithm that reads activations has none to read: rounding to nearest takes its place."""
    chain = plan.recipe.chain
    if not chain.reads_activations:
        return Standalone(plan, checkpoint, shards, device, chain.algorithm)
    said = "outside the decoder blocks: rounded to nearest"
    return Standalone(plan, checkpoint, shards, device, Rtn(), said)
