"""What happened: one row for each piece of work, and how good the result is.

A report holds nothing that differs between two runs of the same plan (no times, no paths), so that an interrupted run
ends with the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from roundel.algorithms import Rounded
from roundel.fusion import Errors
from roundel.planning import Plan, Work
from roundel.unit import Layer

__all__ = ["LOG", "REPORT", "Progress", "Report", "Row", "became", "converted_row", "decoded_row", "row_of"]

REPORT = "report.json"
LOG = "log.jsonl"  # times stand here, and nowhere else


@dataclass(frozen=True, kw_only=True)
class Row:
    """One finished piece of work.

    sqnr   signal to quantization noise in decibel; None for what was not rounded; infinite where nothing was lost
    nbytes bytes written in each format
    error, baseline   the algorithm's own objective, and the same with plain rounding; None where it has none
    tokens  tokens that the algorithm saw enter the layer
    note   a fallback or another fact worth a row
    energy, noise   sums of squares over what a converted layer decoded to, and over what that changed by; None for
            what was not converted
    rows   the layers of a unit
    """

    name: str
    kind: str
    scheme: str | None = None
    sqnr: float | None = None
    nbytes: tuple[int, ...] = ()
    error: float | None = None
    baseline: float | None = None
    tokens: int | None = None
    note: str | None = None
    energy: float | None = None
    noise: float | None = None
    rows: tuple[Row, ...] = ()

    def flat(self) -> tuple[Row, ...]:
        """The layers' rows and then the unit's own, which is a copy of what stays; a single row as it is."""
        return (*self.rows, replace(self, kind="copy", rows=())) if self.kind == "unit" else (self,)

    def to_dict(self) -> dict[str, object]:
        sqnr = self.sqnr if self.sqnr is None or math.isfinite(self.sqnr) else str(self.sqnr)
        found: dict[str, object] = {
            "name": self.name,
            "kind": self.kind,
            "scheme": self.scheme,
            "sqnr": sqnr,
            "nbytes": list(self.nbytes),
            "error": self.error,
            "baseline": self.baseline,
            "tokens": self.tokens,
            "note": self.note,
        }
        found |= {} if self.energy is None else {"energy": self.energy, "noise": self.noise}
        return found | ({"rows": [row.to_dict() for row in self.rows]} if self.rows else {})

    @classmethod
    def from_dict(cls, row: Mapping[str, object]) -> Row:
        sqnr, nbytes, rows = row.get("sqnr"), row.get("nbytes"), row.get("rows")
        return cls(
            name=str(row["name"]),
            kind=str(row["kind"]),
            scheme=None if row.get("scheme") is None else str(row["scheme"]),
            sqnr=None if sqnr is None else float(str(sqnr)),
            nbytes=tuple(nbytes) if isinstance(nbytes, Sequence) else (),
            error=_number(row.get("error")),
            baseline=_number(row.get("baseline")),
            tokens=None if row.get("tokens") is None else int(str(row["tokens"])),
            note=None if row.get("note") is None else str(row["note"]),
            energy=_number(row.get("energy")),
            noise=_number(row.get("noise")),
            rows=tuple(cls.from_dict(r) for r in rows) if isinstance(rows, Sequence) else (),
        )


def row_of(layer: Layer, rounded: Rounded | None, errors: Errors, note: str | None = None) -> Row:
    """The row of a layer that was rounded. rounded: None for plain rounding in one pass."""
    found = Row(name=layer.name, kind="round", scheme=layer.scheme.name, sqnr=round(errors.sqnr, 4), note=note)
    if rounded is None:
        return found
    return replace(
        found,
        error=_short(rounded.error),
        baseline=_short(rounded.baseline),
        tokens=rounded.tokens,
        note=rounded.fallback or rounded.note or note,
    )


def converted_row(layer: Layer, rounded: Rounded | None, errors: Errors) -> Row:
    """The row of a layer that was converted. rounded: None where it became floats."""
    return replace(row_of(layer, rounded, errors), energy=_short(errors.signal), noise=_short(errors.noise))


def decoded_row(layer: Layer, dtype: str, errors: Errors) -> Row:
    """The row of a quantized matrix that becomes floats in a conversion."""
    row = converted_row(layer, None, errors)
    return replace(row, kind="decode", scheme=None, sqnr=None, note=became(dtype, errors))


def became(dtype: str, errors: Errors) -> str | None:
    """What is to be said of floats that became others: None where these hold the same numbers."""
    return f"became {dtype}: signal to noise {errors.sqnr:.1f} dB" if errors.noise else None


class Progress(Protocol):
    """Who watches a run."""

    def __call__(self, work: Work, row: Row) -> None:
        """A piece of work is done. The row of a unit holds its layers' rows."""


def _number(value: object) -> float | None:
    return None if value is None else float(str(value))


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How many layers that were or became quantized came through number for number, how many changed, and what that
    cost in all: errors of what the new file decodes to against what the old one did."""

    exact: int
    changed: int
    errors: Errors

    def to_dict(self) -> dict[str, object]:
        sqnr = self.errors.sqnr
        return {
            "exact": self.exact,
            "changed": self.changed,
            "sqnr": round(sqnr, 4) if math.isfinite(sqnr) else str(sqnr),
        }


@dataclass(frozen=True, kw_only=True)
class Report:
    """The whole run. `rows` stand in the plan's order, whatever the order of work was."""

    plan: Plan
    folder: Path
    rows: tuple[Row, ...]
    seconds: float
    resumed: int = 0
    already_complete: bool = False

    @property
    def rounded(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.sqnr is not None)

    @property
    def worst(self) -> Row | None:
        """The layer that lost most."""
        return min(self.rounded, key=lambda row: row.sqnr if row.sqnr is not None else math.inf, default=None)

    @property
    def mean_sqnr(self) -> float:
        """Mean signal to noise over layers, in decibel, those without loss left out."""
        finite = [row.sqnr for row in self.rounded if row.sqnr is not None and math.isfinite(row.sqnr)]
        return sum(finite) / len(finite) if finite else math.inf

    @property
    def converted(self) -> Conversion | None:
        """What a conversion did; None for another run."""
        if self.plan.recipe.conversion is None:
            return None
        sums = [(row.energy, row.noise) for row in self.rows if row.energy is not None and row.noise is not None]
        exact = sum(noise == 0 for _, noise in sums)
        errors = Errors(sum(energy for energy, _ in sums), sum(noise for _, noise in sums))
        return Conversion(exact=exact, changed=len(sums) - exact, errors=errors)

    def to_json(self, output: int) -> str:
        """The report of one format, as it is saved beside the files."""
        rows = [
            {k: v for k, v in row.to_dict().items() if k != "nbytes" and v is not None} | {"bytes": row.nbytes[output]}
            for row in self.rows
        ]
        plan = self.plan
        head: dict[str, object] = {
            "fingerprint": plan.fingerprint,
            "source": plan.source_name,
            "source_format": plan.source_format,
            "revision": plan.source_revision,
            "family": plan.family,
            "format": plan.outputs[output].format.name,
            "measured_as": plan.outputs[0].format.name,
            "algorithm": plan.recipe.algorithm,
            "transforms": [step.name for step in plan.recipe.chain.transforms],
            "bits_per_weight": round(plan.bits_per_weight, 4),
            "bytes": plan.outputs[output].nbytes,
            "source_bytes": plan.source_bytes,
            "mean_sqnr": round(self.mean_sqnr, 4) if math.isfinite(self.mean_sqnr) else str(self.mean_sqnr),
            "notes": list(plan.notes),
            "demoted": dict(plan.demoted),
            "kept": [{"name": k.name, "reason": k.reason} for k in plan.kept],
            "rows": rows,
        }
        if self.converted is not None:
            head["conversion"] = self.converted.to_dict()
        return json.dumps(head, indent=1) + "\n"
