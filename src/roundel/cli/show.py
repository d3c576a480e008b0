"""How plans, reports and checks are printed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from roundel.card import size
from roundel.page import decibel, fallbacks, relative_error
from roundel.planning import Plan
from roundel.planning.room import expected_peak, unit_memory
from roundel.report import Report

__all__ = ["Bar", "console", "decibel", "duration", "folded", "print_plan", "print_report", "progress", "table"]

WIDE = 120  # columns where no terminal says how many there are

console = Console(highlight=False, soft_wrap=False)
if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = WIDE
NAMED = 3  # layers that fell back, named by the report of a run


def progress(where: Console, before: Sequence[ProgressColumn] = (), after: Sequence[ProgressColumn] = ()) -> Progress:
    """A bar with the time left, on terminals alone.

    before, after   columns that stand before the time left, and between it and what is at hand
    """
    return Progress(
        BarColumn(),
        TaskProgressColumn(),
        *before,
        TextColumn("left"),
        TimeRemainingColumn(),
        *after,
        TextColumn("{task.description}", markup=False),
        console=where,
        disable=not where.is_interactive,
        transient=True,
    )


class Bar:
    """A bar with the time left and what is at hand."""

    def __init__(self, where: Console | None = None) -> None:
        """where: None for the output"""
        self._progress = progress(where or console)
        self._task = self._progress.add_task("", total=1.0)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tick(self, done: float, text: str) -> None:
        self._progress.update(self._task, completed=done, description=text)


def duration(seconds: float) -> str:
    """40 s; 12 min; 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def table(first: str, *others: str) -> Table:
    """A plain table whose first column, the names, is never cut."""
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(first, no_wrap=True)
    for name in others:
        made.add_column(name, overflow="fold")
    return made


def folded(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, int, tuple[str, ...]]]:
    """Rows that differ only in the numbers of their first cell -> (pattern, how many, other cells), in order."""
    found: dict[tuple[str, ...], int] = {}
    for name, *rest in rows:
        key = (re.sub(r"\d+", "*", name), *rest)
        found[key] = found.get(key, 0) + 1
    return [(key[0], count, key[1:]) for key, count in found.items()]


def print_plan(plan: Plan, workers: int, device: str, between: int = 0) -> None:
    """The table of layers, what stays and why, sizes, memory, files.

    between   bytes of activations that lie in memory between units
    """
    console.print(f"[bold]{escape(plan.source_name)}[/], family {escape(plan.family)}\n")
    layers = table("layers", "count", "shape", "scheme", "bits", "decided by")
    first = plan.outputs[0].format
    rows = [
        (layer.name, f"{layer.shape[0]}×{layer.shape[1]}", layer.scheme.name,
         f"{sum(s.nbytes for s in first.outputs(layer)) * 8 / layer.parameters:.3f}", plan.origins[layer.name])
        for layer in plan.layers
    ]  # fmt: skip
    for pattern, count, cells in folded(rows):
        layers.add_row(escape(pattern), str(count), *map(escape, cells))
    if plan.layers:
        console.print(layers)
        console.print()
    if plan.kept:
        kept = table("kept in full precision", "count", "shape", "dtype", "why")
        for pattern, count, cells in folded(
            (k.name, f"{k.shape[0]}×{k.shape[1]}", k.dtype, k.reason) for k in plan.kept
        ):
            kept.add_row(escape(pattern), str(count), *map(escape, cells))
        console.print(kept)
    console.print()
    if plan.recipe.reads_activations:
        _print_units(plan, device)
    for note in plan.notes:
        console.print(f"[yellow]note[/] {escape(note)}")
    console.print(f"{plan.extent}, {plan.parameters / 1e6:.1f} M weights" if plan.layers else plan.extent)
    for output in plan.outputs:
        share = output.nbytes / max(1, plan.source_bytes)
        console.print(
            f"{output.format.name}: {size(output.nbytes)} ({share:.0%} of {size(plan.source_bytes)}) in "
            f"{len(output.shards)} file{'s' if len(output.shards) > 1 else ''}"
        )
        for shard in output.shards:
            console.print(f"  {shard.name}  {size(shard.nbytes)}")
    console.print(
        f"peak memory about {size(expected_peak(plan, workers, device) + between)} with {workers} "
        f"worker{'s' if workers > 1 else ''}"
    )


def _print_units(plan: Plan, device: str) -> None:
    """The units of a plan that looks at data, what is done with each, and on what."""
    recipe = plan.recipe
    steps = ", then ".join(step.name for step in recipe.chain.steps)
    units = table("units, one after the other", "count", "layers", "steps")
    rows = [(work.name, str(len(work.layers)), steps) for work in plan.works if work.kind == "unit"]
    for pattern, count, cells in folded(rows):
        units.add_row(escape(pattern), str(count), *map(escape, cells))
    console.print(units)
    limit = " (the model takes no more)" if plan.tokens < recipe.seqlen else ""
    console.print(
        f"calibrated on {escape(recipe.dataset)}: {recipe.nsamples} samples of {plan.tokens} tokens{limit}, "
        f"{recipe.together} at a time, seed {recipe.seed}"
    )
    weights, activations = unit_memory(plan, device)
    console.print(
        f"one unit at a time in memory: about {size(weights)} of weights and what is made of them, "
        f"{size(activations)} of activations\n"
    )


def print_report(report: Report) -> None:
    """What a run did, in a few lines."""
    plan = report.plan
    if report.already_complete:
        console.print(
            f"{escape(str(report.folder))} is complete already: same recipe, same source. Pass --overwrite to make it "
            "anew."
        )
        return
    for note in plan.notes:
        console.print(f"[yellow]note[/] {escape(note)}")
    if report.resumed:
        console.print(f"continued: {report.resumed} of {len(plan.works)} pieces were done already")
    worst = report.worst if report.converted is None or report.converted.changed else None
    matrices = "1 matrix" if len(plan.kept) == 1 else f"{len(plan.kept)} matrices"
    console.print(f"{plan.extent}; {matrices} kept in full precision")
    if worst is not None:
        console.print(
            f"signal to noise {decibel(report.mean_sqnr)} on average, lowest {decibel(worst.sqnr)} "
            f"({escape(worst.name)})"
        )
    shares = [share for share in map(relative_error, report.rounded) if share is not None]
    if shares:
        console.print(f"error {sum(shares) / len(shares):.3f} of plain rounding's, mean over {len(shares)} layers")
    if report.converted is not None:
        told = report.converted
        console.print(f"{told.exact} layers hold the same numbers as before, bit for bit")
        if told.changed:
            console.print(
                f"{told.changed} layers changed: signal to noise {decibel(told.errors.sqnr)} over all weights"
            )
    fallen = fallbacks(report)
    if fallen:
        what = "fell back" if report.converted is None else "had to be rounded anew"
        console.print(f"[yellow]{len(fallen)} layer{'s' if len(fallen) > 1 else ''} {what}[/]")
        for row in fallen[:NAMED]:
            console.print(f"  {escape(row.name)}: {escape(row.note or '')}")
        if len(fallen) > NAMED:
            console.print(f"  and {len(fallen) - NAMED} more: report.html names them")
    for output in plan.outputs:
        console.print(f"{output.format.name}: {size(output.nbytes)}, was {size(plan.source_bytes)}")
    console.print(f"{report.seconds:.1f} s, {escape(str(report.folder))}")
