"""What a page tells, worked out from a report and its log: bits, errors against plain rounding, costs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from roundel.planning import Output
from roundel.report import Report, Row
from roundel.unit import Layer

__all__ = [
    "Cost",
    "Findings",
    "counted",
    "decibel",
    "duration",
    "fallbacks",
    "mean",
    "place",
    "read_costs",
    "relative_error",
]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a unit took: seconds, and bytes of memory that the process had reached at its end."""

    seconds: float
    peak_memory: int | None = None


def read_costs(log: Path) -> dict[str, Cost]:
    """Unit name -> what it took, from a log of one JSON object a line; empty where there is none.

    A line that a kill cut short is skipped. A unit that was done twice counts as it was done last.
    """
    found: dict[str, Cost] = {}
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            row = json.loads(line)
            memory = row.get("peak_memory_bytes")
            found[str(row["unit"])] = Cost(
                seconds=float(row["unit_seconds"]), peak_memory=None if memory is None else int(memory)
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def relative_error(row: Row) -> float | None:
    """The error as a share of plain rounding's; None where either is unknown or plain rounding has none."""
    if row.error is None or not row.baseline or not math.isfinite(row.error / row.baseline):
        return None
    return row.error / row.baseline


def fallbacks(report: Report) -> tuple[Row, ...]:
    """The layers that were not rounded as asked, each with its reason in `note`."""
    return tuple(row for row in report.rounded if row.note)


@dataclass(frozen=True)
class Findings:
    """A report, and what several parts of the page ask of it."""

    report: Report
    output: Output
    costs: Mapping[str, Cost]

    @cached_property
    def layers(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.report.plan.layers}

    @cached_property
    def bits(self) -> dict[str, float]:
        """Stored bits per weight of each layer, scales and zero points included."""
        outputs = self.output.format.outputs
        return {
            name: 8 * sum(spec.nbytes for spec in outputs(layer)) / layer.parameters
            for name, layer in self.layers.items()
        }

    @cached_property
    def relative(self) -> dict[str, float]:
        """Layer name -> its error as a share of plain rounding's, where both are known."""
        found = {row.name: relative_error(row) for row in self.report.rounded}
        return {name: value for name, value in found.items() if value is not None}

    @cached_property
    def units(self) -> tuple[str, ...]:
        return tuple(work.name for work in self.report.plan.works if work.kind == "unit")


def place(name: str) -> tuple[str, int]:
    """(the name with its numbers as *, the block's number): model.layers.*.mlp.experts.*.up_proj, 3. -1 outside of
    blocks."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", name)
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), int(numbers[0]) if numbers else -1


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def counted(texts: Iterable[str]) -> list[str]:
    """["3 × gate", "1 × head"], in the order in which each text first came."""
    counts: dict[str, int] = {}
    for text in texts:
        counts[text] = counts.get(text, 0) + 1
    return [f"{count} × {text}" for text, count in counts.items()]


def decibel(value: float | None) -> str:
    """19.6 dB; "exact" where nothing was lost."""
    return "" if value is None else "exact" if math.isinf(value) else f"{value:.1f} dB"


def duration(seconds: float) -> str:
    """0.42 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
