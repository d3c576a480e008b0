"""What happened: one row for each piece of work, and how good the result is.

A report holds nothing that differs between two runs of the same plan (no times, no paths), so that an interrupted run
ends with the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from roundel.planning import Plan

__all__ = ["REPORT", "Report", "Row"]

REPORT = "report.json"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One finished piece of work.

    sqnr   signal to quantization noise in decibel; None for what was not rounded; infinite where nothing was lost
    nbytes bytes written in each format
    note   a fallback or another fact worth a row
    """

    name: str
    kind: str
    scheme: str | None = None
    sqnr: float | None = None
    nbytes: tuple[int, ...] = ()
    note: str | None = None

    def to_dict(self) -> dict[str, object]:
        sqnr = self.sqnr if self.sqnr is None or math.isfinite(self.sqnr) else str(self.sqnr)
        return {
            "name": self.name,
            "kind": self.kind,
            "scheme": self.scheme,
            "sqnr": sqnr,
            "nbytes": list(self.nbytes),
            "note": self.note,
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, object]) -> Row:
        sqnr, nbytes = row.get("sqnr"), row.get("nbytes")
        return cls(
            name=str(row["name"]),
            kind=str(row["kind"]),
            scheme=None if row.get("scheme") is None else str(row["scheme"]),
            sqnr=None if sqnr is None else float(str(sqnr)),
            nbytes=tuple(nbytes) if isinstance(nbytes, Sequence) else (),
            note=None if row.get("note") is None else str(row["note"]),
        )


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

    def to_json(self, output: int) -> str:
        """The report of one format, as it is saved beside the files."""
        rows = [
            {k: v for k, v in row.to_dict().items() if k != "nbytes" and v is not None} | {"bytes": row.nbytes[output]}
            for row in self.rows
        ]
        plan = self.plan
        head = {
            "fingerprint": plan.fingerprint,
            "source": plan.source_name,
            "revision": plan.source_revision,
            "family": plan.family,
            "format": plan.outputs[output].format.name,
            "bits_per_weight": round(plan.bits_per_weight, 4),
            "bytes": plan.outputs[output].nbytes,
            "source_bytes": plan.source_bytes,
            "mean_sqnr": round(self.mean_sqnr, 4) if math.isfinite(self.mean_sqnr) else str(self.mean_sqnr),
            "notes": list(plan.notes),
            "demoted": dict(plan.demoted),
            "kept": [{"name": k.name, "reason": k.reason} for k in plan.kept],
            "rows": rows,
        }
        return json.dumps(head, indent=1) + "\n"
