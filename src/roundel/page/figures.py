"""The page's figures: a frame for each kind of matrix over the blocks, and a bar for each unit's cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from roundel.card import size
from roundel.page.findings import Findings, duration, place
from roundel.page.svg import Axis, Line, Point, axis_over, bars, panel
from roundel.tensor import ITEMSIZE

__all__ = ["costs_of_units", "plots"]


def plots(told: Findings) -> str:
    """HTML: errors, noise, sizes and gains of all layers, by kind and depth; empty where nothing was measured."""
    rows = told.report.rounded
    errors = {r.name: r.error for r in rows if r.error is not None and r.error > 0 and math.isfinite(r.error)}
    plain = {
        r.name: r.baseline for r in rows if r.baseline is not None and r.baseline > 0 and math.isfinite(r.baseline)
    }
    noise = {r.name: r.sqnr for r in rows if r.sqnr is not None and math.isfinite(r.sqnr)}
    kept = {k.name: 8.0 * ITEMSIZE[k.dtype] for k in told.report.plan.kept if k.dtype in ITEMSIZE}
    found = [
        _panels(
            "Error against plain rounding",
            "The algorithm's own objective as a share of what plain rounding comes to (dashed: 1). Lower is better.",
            {"after": told.relative},
            axis_over(told.relative.values(), including=(0.0, 1.0)),
            reference=1.0,
        ),
        _panels(
            "Error before and after",
            '<span class="key"><i></i>as chosen <i class="before"></i>plain rounding</span>. Logarithmic; each frame '
            "has its own axis.",
            {"before": plain, "after": errors},
            None,
            hover=False,
        ),
        _panels(
            "Signal to noise",
            "Decibel, of the weights themselves. An algorithm that looks at data may lower it, to make a smaller error "
            "in what a layer computes.",
            {"after": noise},
            axis_over(noise.values()),
        ),
        _panels(
            "Bits per weight",
            '<span class="key"><i></i>rounded, scales and zero points included <i class="before"></i>kept</span>',
            {"before": kept, "after": told.bits},
            axis_over((*told.bits.values(), *kept.values()), including=(0.0,)),
            hover=False,
        ),
    ]
    return "".join(found)


def _panels(
    title: str,
    why: str,
    series: Mapping[str, Mapping[str, float]],
    axis: Axis | None,
    *,
    reference: float | None = None,
    hover: bool = True,
) -> str:
    """One frame for each kind of matrix, blocks from left to right. axis: None for one each, logarithmic."""
    gathered: dict[str, dict[str, dict[int, list[float]]]] = {}
    for line, values in series.items():
        for name, value in values.items():
            kind, block = place(name)
            gathered.setdefault(kind, {}).setdefault(line, {}).setdefault(block, []).append(value)
    if not gathered:
        return ""
    blocks = {kind: {block for points in lines.values() for block in points} for kind, lines in gathered.items()}
    outside = [kind for kind, of in blocks.items() if of == {-1}]
    inside = set().union(*(of for kind, of in blocks.items() if kind not in outside))
    titles, found = _titles(gathered), []
    for kind in (*(kind for kind in gathered if kind not in outside), *outside):
        lines, span = gathered[kind], (-1, -1) if kind in outside else (min(inside), max(inside))
        own = axis or axis_over((v for points in lines.values() for p in points.values() for v in p), logarithmic=True)
        drawn = [
            Line(kind=line, hover=hover, points=tuple(_point(block, of) for block, of in sorted(points.items())))
            for line, points in lines.items()
        ]
        found.append(panel(titles[kind], drawn, own, span, reference=reference))
    return f'<h2>{title}</h2>\n<p class="why">{why}</p>\n<div class="panels">\n{"".join(found)}</div>\n'


def _point(block: int, values: Sequence[float]) -> Point:
    return Point(index=block, value=sum(values) / len(values), low=min(values), high=max(values))


def _titles(kinds: Iterable[str]) -> dict[str, str]:
    """What follows the block's number, where that is enough to tell kinds apart."""
    brief = {kind: kind.partition(".*.")[2] or kind for kind in kinds}
    taken = list(brief.values())
    return {kind: text if taken.count(text) == 1 else kind for kind, text in brief.items()}


def costs_of_units(told: Findings) -> str:
    """HTML: seconds of each unit, and the memory held by then; empty where no log has them."""
    known = {name: told.costs[name] for name in told.units if name in told.costs}
    if not known:
        return ""
    seconds = [(name, known[name].seconds if name in known else None) for name in told.units]
    memory = [(name, known[name].peak_memory if name in known else None) for name in told.units]
    found = f"<h2>Time</h2>\n<p class=why>Of each unit, in order.</p>\n{bars('', seconds, duration)}"
    if any(peak is not None for _, peak in memory):
        why = "The most the process had held by the end of each unit; it begins anew where a run was continued."
        found += f"<h2>Memory</h2>\n<p class=why>{why}</p>\n{bars('', memory, size)}"
    return found
