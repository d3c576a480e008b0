"""Small charts as inline SVG: numbers in, text out. Colours are classes that the page's style gives a meaning.

A chart has a frame of its own coordinates and grows with the page. It knows nothing of models, layers or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Axis", "Line", "Point", "axis_over", "bars", "panel", "scatter", "short"]

WIDTH, HEIGHT = 260, 124  # of a panel; bars are wider
WIDE, TALL = 960, 300  # of bars, which are as high as panels, and of a scatter
LEFT, RIGHT, TOP, BOTTOM = 42, 8, 8, 18  # margins; left of bars stand longer labels
LEFT_OF_BARS = 62
TICKS = 4  # labelled lines of an axis, at most about


@dataclass(frozen=True, kw_only=True)
class Point:
    """A mean and the range it stands for; `low == value == high` for a single number."""

    index: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points in order, with the class that colours them. hover: whether each tells its value under the pointer."""

    kind: str
    points: tuple[Point, ...]
    hover: bool = True


@dataclass(frozen=True, kw_only=True)
class Axis:
    """low < high; ticks lie between them."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, 0 at `low` and 1 at `high`; values beyond are drawn at the end."""
        if self.logarithmic:
            found = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            found = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, found))


def short(value: float) -> str:
    """Three digits: 0.831, 1.2e-05, 12."""
    return f"{value:.3g}"


def axis_over(values: Iterable[float], *, including: Sequence[float] = (), logarithmic: bool = False) -> Axis:
    """An axis over finite values (positive ones where it is logarithmic), with round ticks."""
    found = [*values, *including] or [0.0, 1.0]
    low, high = min(found), max(found)
    if logarithmic and low > 0:
        low, high = low / 1.3, high * 1.3
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1, 2, 5), (1,)):
            ticks = [t for decade in decades for digit in digits if low <= (t := digit * 10.0**decade) <= high]
            if len(ticks) <= TICKS:
                break
        else:
            ticks = ticks[:: math.ceil(len(ticks) / TICKS)]
        return Axis(low=low, high=high, ticks=tuple(ticks or (low, high)), logarithmic=True)
    if low == high:
        low, high = low - abs(low) * 0.1, high + (abs(high) * 0.1 or 1.0)
    rough = (high - low) / TICKS
    decade = 10.0 ** math.floor(math.log10(rough))
    step = next(m * decade for m in (1, 2, 5, 10) if m * decade >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    margin = (high - low) * 0.05
    return Axis(
        low=low if low == 0 else low - margin,
        high=high + margin,
        ticks=tuple(n * step for n in range(first, last + 1)),
    )


def panel(
    title: str, lines: Sequence[Line], axis: Axis, span: tuple[int, int], *, reference: float | None = None
) -> str:
    """Values over an index. span: first and last index of the frame; reference: a level to compare with."""
    across = _across(span, WIDTH)
    body = [*_frame(axis, LEFT, WIDTH, short), _ends(span, WIDTH)]
    if reference is not None:
        height = _number(_down(axis, reference))
        body.append(f'<path class="reference" d="M{LEFT} {height}H{WIDTH - RIGHT}"/>')
    for line in lines:
        body += _drawn(line, axis, across, names=span[0] < span[1])
    return _figure(title, WIDTH, body)


def bars(title: str, values: Sequence[tuple[str, float | None]], say: Callable[[float], str]) -> str:
    """One upright bar for each (name, value), from zero; none where the value is not known. say: a value in words."""
    axis = axis_over([value for _, value in values if value is not None], including=(0.0,))
    body = _frame(axis, LEFT_OF_BARS, WIDE, say)
    pitch = (WIDE - LEFT_OF_BARS - RIGHT) / max(1, len(values))
    bottom = _down(axis, 0.0)
    for number, (name, value) in enumerate(values):
        if value is not None:
            top, left = _down(axis, value), LEFT_OF_BARS + number * pitch + pitch * 0.1
            body.append(
                f'<rect class="after" x="{_number(left)}" y="{_number(top)}" width="{_number(min(60.0, pitch * 0.8))}" '
                f'height="{_number(bottom - top)}"><title>{escape(name)}: {escape(say(value))}</title></rect>'
            )
    return _figure(title, WIDE, body)


def scatter(
    title: str,
    points: Sequence[tuple[str, float, float]],
    says: tuple[Callable[[float], str], Callable[[float], str]],
    best: Sequence[str] = (),
) -> str:
    """A dot for each (name, across, up). says: either number in words; best: names joined by a line, left to right."""
    across = axis_over([x for _, x, _ in points])
    up = axis_over([y for _, _, y in points])
    width = WIDE - LEFT_OF_BARS - RIGHT
    places = {
        name: (LEFT_OF_BARS + width * across.share(x), TOP + (TALL - TOP - BOTTOM) * (1 - up.share(y)))
        for name, x, y in points
    }
    body = []
    for tick in up.ticks:
        height = TOP + (TALL - TOP - BOTTOM) * (1 - up.share(tick))
        body.append(f'<path class="grid" d="M{LEFT_OF_BARS} {_number(height)}H{WIDE - RIGHT}"/>')
        body.append(
            f'<text class="tick" x="{LEFT_OF_BARS - 4}" y="{_number(height + 3)}">{escape(says[1](tick))}</text>'
        )
    for tick in across.ticks:
        at = _number(LEFT_OF_BARS + width * across.share(tick))
        body.append(f'<path class="grid" d="M{at} {TOP}V{TALL - BOTTOM}"/>')
        body.append(f'<text class="tick" x="{at}" y="{TALL - 5}">{escape(says[0](tick))}</text>')
    line = "L".join(f"{_number(x)} {_number(y)}" for x, y in sorted(places[name] for name in best))
    drawn = [f'<path d="M{line}"/>'] if len(best) > 1 else []
    for name, x, y in points:
        left, top = places[name]
        told = f"{escape(name)}: {escape(says[0](x))}, {escape(says[1](y))}"
        drawn.append(f'<circle cx="{_number(left)}" cy="{_number(top)}" r="4"><title>{told}</title></circle>')
        is_right = left > WIDE / 2
        side, place = ('class="tick"', left - 7) if is_right else ("", left + 7)
        drawn.append(f'<text {side} x="{_number(place)}" y="{_number(top - 5)}">{escape(name)}</text>')
    return _figure(title, WIDE, [*body, '<g class="line after">', *drawn, "</g>"], TALL)


def _figure(title: str, width: int, body: Iterable[str], height: int = HEIGHT) -> str:
    caption = f"<figcaption>{escape(title)}</figcaption>" if title else ""
    name = f' aria-label="{escape(title)}"' if title else ""
    return f'<figure>{caption}<svg viewBox="0 0 {width} {height}" role="img"{name}>{"".join(body)}</svg></figure>\n'


def _frame(axis: Axis, left: int, width: int, say: Callable[[float], str]) -> list[str]:
    """A line and a label for each tick."""
    found = []
    for tick in axis.ticks:
        height = _down(axis, tick)
        found.append(f'<path class="grid" d="M{left} {_number(height)}H{width - RIGHT}"/>')
        found.append(f'<text class="tick" x="{left - 4}" y="{_number(height + 3)}">{escape(say(tick))}</text>')
    return found


def _ends(span: tuple[int, int], width: int) -> str:
    first, last = span
    if first == last:
        return ""
    return (
        f'<text x="{LEFT}" y="{HEIGHT - 5}">{first}</text>'
        f'<text class="tick" x="{width - RIGHT}" y="{HEIGHT - 5}">{last}</text>'
    )


def _drawn(line: Line, axis: Axis, across: Callable[[int], float], names: bool) -> list[str]:
    """Neighbours are joined, ranges are upright strokes, each point is a dot. names: whether a dot tells its index."""
    if not line.points:
        return []
    path, ranges, dots, before = [], [], [], None
    for point in line.points:
        x, y = _number(across(point.index)), _number(_down(axis, point.value))
        path.append(f"{'L' if before is not None and point.index == before + 1 else 'M'}{x} {y}")
        before = point.index
        if point.low < point.high:
            ranges.append(f"M{x} {_number(_down(axis, point.low))}V{_number(_down(axis, point.high))}")
        told = f"{point.index}: {short(point.value)}" if names else short(point.value)
        if point.low < point.high:
            told += f" ({short(point.low)} to {short(point.high)})"
        dots.append(f'<circle cx="{x}" cy="{y}" r="2"><title>{told}</title></circle>' if line.hover else f"M{x} {y}h0")
    found = [f'<path d="{"".join(path)}"/>']
    if ranges:
        found.append(f'<path class="range" d="{"".join(ranges)}"/>')
    found.append("".join(dots) if line.hover else f'<path class="dots" d="{"".join(dots)}"/>')
    return [f'<g class="line {line.kind}">', *found, "</g>"]


def _across(span: tuple[int, int], width: int) -> Callable[[int], float]:
    first, last = span
    inner = width - LEFT - RIGHT - 8
    return lambda index: LEFT + 4 + (inner * (index - first) / (last - first) if last > first else inner / 2)


def _down(axis: Axis, value: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - axis.share(value))


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
