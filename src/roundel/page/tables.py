"""The page's tables: every layer, what was kept, what transforms did."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape

from roundel.page.findings import Findings, mean, place
from roundel.planning import Plan
from roundel.report import Report, Row

__all__ = ["kept_table", "layer_table", "remarks_table"]

HEADS = (  # and whether a column holds numbers
    ("layer", False), ("shape", False), ("scheme", False), ("bits", True), ("dB", True), ("error", True),
    ("plain rounding", True), ("share", True), ("tokens", True), ("fallback", False),
)  # fmt: skip
SHARE = 7  # its column
FOLD = 1500  # layers; with more, the experts of a block share a line


def layer_table(told: Findings) -> str:
    """A line for each layer; with very many, one for each block's experts."""
    gathered: dict[str, list[Row]] = {}
    folds = len(told.report.rounded) > FOLD
    for row in told.report.rounded:
        name = re.sub(r"(experts)\.\d+(?=\.|$)", r"\1.*", row.name) if folds else row.name
        gathered.setdefault(name, []).append(row)
    lines = "".join(_line(told, name, rows) for name, rows in gathered.items())
    head = "".join(f"<th{' class=n' if is_number else ''}>{text}" for text, is_number in HEADS)
    why = "Error and plain rounding are the algorithm's own objective; share is one over the other."
    if folds:
        why += " Experts of a block share a line, with means; report.json has each."
    return (
        f"<h2>Layers</h2>\n<p class=why>{why}</p>\n"
        f'<div class="wide"><table class="rows"><thead><tr>{head}</thead><tbody>\n{lines}</tbody></table></div>\n'
    )


def _line(told: Findings, name: str, rows: Sequence[Row]) -> str:
    layers = [told.layers[row.name] for row in rows]
    noted = [row.note for row in rows if row.note]
    note = noted[0] if noted else ""
    if len(rows) > 1:
        name += f" ({len(rows)})"
        note = f"{len(noted)} of {len(rows)}: {note}" if noted else ""
    share = mean(told.relative.get(row.name) for row in rows)
    lossy = mean(row.sqnr for row in rows if row.sqnr is not None and math.isfinite(row.sqnr))
    numbers = (
        _digits(mean(told.bits[row.name] for row in rows), ".3f"),
        _digits(lossy, ".2f") or "exact",
        _digits(mean(row.error for row in rows), ".4g"),
        _digits(mean(row.baseline for row in rows), ".4g"),
        _digits(share, ".3f"),
        _digits(mean(row.tokens for row in rows), ".0f"),
    )
    shape, schemes = f"{layers[0].shape[0]}×{layers[0].shape[1]}", dict.fromkeys(v.scheme.name for v in layers)
    cells = [f"<td>{escape(text)}" for text in (name, shape, ", ".join(schemes))]
    cells += [f"<td class=n>{text}" for text in numbers]
    if share is not None and share > 1:
        cells[SHARE] = f'<td class="n warn">{_digits(share, ".3f")}'
    return f"<tr>{''.join(cells)}<td{' class=warn' if note else ''}>{escape(note)}\n"


def _digits(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def kept_table(plan: Plan) -> str:
    """Matrices that differ in numbers of their names alone share a line."""
    if not plan.kept:
        return ""
    gathered: dict[tuple[str, ...], int] = {}
    for kept in plan.kept:
        key = (place(kept.name)[0], f"{kept.shape[0]}×{kept.shape[1]}", kept.dtype, kept.reason)
        gathered[key] = gathered.get(key, 0) + 1
    rows = "".join(
        f"<tr><td>{escape(name)}<td class=n>{count}" + "".join(f"<td>{escape(text)}" for text in rest) + "\n"
        for (name, *rest), count in gathered.items()
    )
    head = "<th>matrices<th class=n>count<th>shape<th>dtype<th>why"
    return (
        f"<h2>Kept in full precision</h2>\n"
        f'<div class="wide"><table class="rows"><thead><tr>{head}</thead><tbody>\n{rows}</tbody></table></div>\n'
    )


def remarks_table(report: Report) -> str:
    """What transforms say of their spaces."""
    found = [(row.name, row.note) for row in report.rows if row.sqnr is None and row.note]
    if not found:
        return ""
    items = "".join(f"<tr><th>{escape(name)}<td>{escape(text)}\n" for name, note in found for text in note.split("; "))
    inside = f'<summary>What each space became</summary><table class="facts">\n{items}</table>'
    return f"<h2>Transforms</h2>\n<details>{inside}</details>\n"
