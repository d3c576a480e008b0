"""The report as a page: it holds what happened, needs nothing from elsewhere, and believes no name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

import roundel
from models.pico import build
from roundel.cli import show
from roundel.page import PAGE, Cost, duration, fallbacks, page, read_costs, relative_error
from roundel.page.svg import axis_over
from roundel.report import LOG, Report

HOSTILE = "x\"><script>alert(1)</script>&amp;'<img src=x onerror=y>"
OPEN_AT_WILL = {"tr", "td", "th", "li", "thead", "tbody"}  # whose ends HTML lets out
VOID = {"meta", "img"}


class Parsed(HTMLParser):
    """Elements in order with their attributes and all texts; fails on a tag that closes what is not open."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.cells: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag == "td":
            self.cells.append("")
        if tag not in VOID | OPEN_AT_WILL and not (tag in ("path", "rect") and self._closes_itself()):
            self._open.append(tag)

    def _closes_itself(self) -> bool:
        return (self.get_starttag_text() or "").endswith("/>")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in OPEN_AT_WILL:
            assert self._open and self._open.pop() == tag, f"</{tag}> in {self._open}"

    def handle_data(self, text: str) -> None:
        self.texts.append(text)
        if self.cells:
            self.cells[-1] += text

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("pico") / "model")


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Of a run of plain rounding."""
    return roundel.quantize(model, tmp_path_factory.mktemp("plain") / "out", scheme="W4A16G32")


@pytest.fixture(scope="module")
def calibrated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Of a run that looked at data. Plain rounding has no objective, so none of the rows has errors."""
    folder = tmp_path_factory.mktemp("calibrated")
    ids = torch.randint(0, 60, (4, 32), generator=torch.Generator().manual_seed(1)).tolist()
    wish = {"dataset": ids, "nsamples": 4, "seqlen": 32, "scheme": "W4A16G32"}
    return roundel.quantize(model, folder / "out", algorithm="smoothquant,rtn", **wish)


def with_errors(report: Report, note: Callable[[int], str | None] = lambda number: None) -> Report:
    """The report of plain rounding as if an algorithm had made it; layer `number` has 10/20, 11/21 ... of the error."""
    rows, number = [], 0
    for row in report.rows:
        if row.sqnr is not None:
            row = replace(row, error=10.0 + number, baseline=20.0 + number, tokens=4096, note=note(number))
            number += 1
        rows.append(row)
    return replace(report, rows=tuple(rows))


def test_of_plain_rounding(plain: Report) -> None:
    text = (plain.folder / PAGE).read_text()
    found = Parsed(text)
    for layer in plain.plan.layers:
        assert layer.name in found.cells
    assert any(plain.plan.fingerprint in cell for cell in found.cells)
    assert "Signal to noise" in text and "Bits per weight" in text
    assert (
        "Error against plain rounding" not in found.texts and "Time" not in found.texts and "Memory" not in found.texts
    )
    assert found.count("figure") == found.count("svg") == 7 + 7 + 2, "each kind of matrix; bits of what is kept, too"
    assert not (plain.folder / LOG).exists() and 'class="notes"' not in text


def test_of_a_calibrated_run(calibrated: Report) -> None:
    text = (calibrated.folder / PAGE).read_text()
    found = Parsed(text)
    assert {"Time", "Memory", "Transforms"} <= set(found.texts)
    costs = read_costs(calibrated.folder / LOG)
    assert list(costs) == [work.name for work in calibrated.plan.works if work.kind == "unit"]
    bars = [text for text in found.texts if text.startswith("model.layers.1: ")]
    seconds, memory = bars[-2:]
    assert seconds == f"model.layers.1: {duration(costs['model.layers.1'].seconds)}" and memory.endswith("B")
    assert all(10**8 < (cost.peak_memory or 0) < 10**11 for cost in costs.values()), "bytes"
    assert "smoothquant (alpha 0.5" in text, "options of each step"
    assert calibrated.plan.recipe.dataset in text


def test_errors_stand_beside_plain_roundings(plain: Report) -> None:
    report = with_errors(plain)
    found = Parsed(page(report, 0))
    assert {"Error against plain rounding", "Error before and after"} <= set(found.texts)
    cells, row = iter(found.cells), report.rounded[3]
    assert row.name in cells, "and goes on behind the name"
    told = [next(cells).strip() for _ in range(8)]
    assert told[3:] == [f"{row.sqnr:.2f}", "13", "23", f"{13 / 23:.3f}", "4096"]
    assert f"1: {11 / 21:.3g}" not in found.texts and f"0: {11 / 21:.3g}" in found.texts, "the block and its value"


def test_it_needs_nothing_from_elsewhere(calibrated: Report) -> None:
    text = (calibrated.folder / PAGE).read_text()
    found = Parsed(text)
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert not [
        at for _, attributes in found.elements for at in attributes if at in ("src", "href", "srcset", "onclick")
    ]
    policy = next(a["content"] for _, a in found.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'") and "sha256-" in policy


def test_names_are_only_text(calibrated: Report) -> None:
    """A name, a note, a reason or a dataset that is HTML is shown, not obeyed."""
    plan = calibrated.plan
    recipe = replace(plan.recipe, dataset=HOSTILE)
    layers = (replace(plan.layers[0], name=HOSTILE), *plan.layers[1:])
    bad = replace(
        plan,
        source_name=HOSTILE,
        source_revision=HOSTILE,
        family=HOSTILE,
        recipe=recipe,
        layers=layers,
        notes=(HOSTILE,),
        kept=tuple(replace(kept, name=HOSTILE, reason=HOSTILE) for kept in plan.kept),
        works=tuple(replace(work, name=HOSTILE) if work.kind == "unit" else work for work in plan.works),
    )
    rows = tuple(
        replace(row, name=HOSTILE if row.name == plan.layers[0].name else row.name, note=HOSTILE)
        for row in calibrated.rows
    )
    text = page(replace(calibrated, plan=bad, rows=rows), 0, {HOSTILE: Cost(seconds=1.0, peak_memory=5)})
    found = Parsed(text)
    assert found.count("script") == 1 and found.count("img") == 0
    assert "<script>alert" not in text and "onerror" not in {a for _, attributes in found.elements for a in attributes}
    assert HOSTILE in found.cells and f"{HOSTILE}, W4A16G32" in found.texts


def test_fallbacks_stand_out(plain: Report) -> None:
    report = with_errors(plain, lambda number: f"saw {number} tokens of 64" if number < 9 else None)
    text = page(report, 0)
    found = Parsed(text)
    assert len(fallbacks(report)) == 9 and "9" in found.texts
    note = next(text for text in found.texts if text.strip().endswith("saw # tokens of #"))
    assert note.count("model.layers.") == 6 and "and 3 more" in note
    assert any(cell.strip() == "saw 8 tokens of 64" for cell in found.cells), "the table names each"


def test_an_error_above_plain_roundings_stands_out(plain: Report) -> None:
    rows = with_errors(plain).rows
    first = next(number for number, row in enumerate(rows) if row.sqnr is not None)
    worse = (*rows[:first], replace(rows[first], error=30.0), *rows[first + 1 :])
    text = page(replace(plain, rows=worse), 0)
    assert f"error above plain rounding&#x27;s: {rows[first].name}\n" in text and 'class="n warn">1.500' in text


def test_sixty_layers_stay_small(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model", num_hidden_layers=60)
    report = roundel.quantize(model, tmp_path / "out", scheme="W4A16G32", workers=1)
    costs = {work.name: Cost(seconds=1.5, peak_memory=10**9) for work in report.plan.works}
    text = page(with_errors(report, lambda number: "saw nothing" if number % 50 == 0 else None), 0, costs)
    found = Parsed(text)
    assert {layer.name for layer in report.plan.layers} <= set(found.cells) and len(report.plan.layers) == 420
    assert len(text.encode()) < 300_000
    assert found.count("circle") == 2 * 420, "errors and noise; other points are strokes of one path"


def test_experts_share_lines_where_they_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3_moe", tmp_path / "model")
    report = with_errors(roundel.quantize(model, tmp_path / "out", scheme="W4A16G32"))
    many = [layer.name for layer in report.plan.layers if ".experts." in layer.name]
    assert set(many) <= set(Parsed(page(report, 0)).cells)
    monkeypatch.setattr("roundel.page.tables.FOLD", 10)
    cells = Parsed(page(report, 0)).cells
    count = sum(name.startswith("model.layers.0.") and name.endswith(".up_proj") for name in many)
    assert not set(many) & set(cells) and f"model.layers.0.mlp.experts.*.up_proj ({count})" in cells


def test_layers_that_lose_nothing(model: Path, tmp_path: Path) -> None:
    """Rounded once more on the same grid: infinite signal to noise is said, not drawn."""
    roundel.quantize(model, tmp_path / "one", scheme="W4A16G32")
    roundel.quantize(tmp_path / "one", tmp_path / "two", scheme="W4A16G32")
    text = (tmp_path / "two" / PAGE).read_text()
    found = Parsed(text)
    assert "exact" in found.texts and "inf" not in text.replace("information", "").split() and "nan" not in text.split()


def test_each_format_has_its_own(model: Path, tmp_path: Path) -> None:
    roundel.quantize(model, tmp_path / "out", scheme="W4A16G32", formats=("auto_round", "auto_awq"))
    for name in ("auto_round", "auto_awq"):
        assert f"stored as {name}." in (tmp_path / "out" / name / PAGE).read_text()


def test_it_is_cleared_and_does_not_travel_along(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    roundel.quantize(model, out, scheme="W4A16G32")
    (out / PAGE).write_text("old")
    (out / LOG).write_text("old")
    roundel.quantize(out, tmp_path / "next", format="auto_gptq")
    assert (tmp_path / "next" / PAGE).read_text() != "old" and not (tmp_path / "next" / LOG).exists()
    roundel.quantize(model, out, scheme="W4A16G32", overwrite=True)
    assert (out / PAGE).read_text() != "old" and not (out / LOG).exists()


def test_a_log_that_was_cut_short(tmp_path: Path) -> None:
    lines = [
        '{"unit": "a", "unit_seconds": 1.0}',
        '{"unit": "b", "unit_sec{"unit": "b", "unit_seconds": 3}',
        '["unit"]',
        '{"unit": "a", "unit_seconds": 2.0, "peak_memory_bytes": 7}',
        '{"unit": "c"',
    ]
    (tmp_path / LOG).write_text("\n".join(lines))
    assert read_costs(tmp_path / LOG) == {"a": Cost(seconds=2.0, peak_memory=7)}
    assert read_costs(tmp_path / "none") == {}


def test_relative_error(plain: Report) -> None:
    row = plain.rounded[0]
    assert relative_error(row) is None
    assert relative_error(replace(row, error=3.0, baseline=4.0)) == 0.75
    assert relative_error(replace(row, error=0.0, baseline=0.0)) is None
    assert relative_error(replace(row, error=float("nan"), baseline=1.0)) is None


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [
        ([], False),
        ([5.0], False),
        ([0.0], False),
        ([-5.0], False),
        ([-3.0, 2.0], False),
        ([19.6, 19.7, 22.0], False),
        ([7.0], True),
        ([3.0, 3.1], True),
        ([1e-9, 2e-9], True),
        ([1e-9, 4e5], True),
    ],
)
def test_an_axis_holds_its_values(values: list[float], logarithmic: bool) -> None:
    axis = axis_over(values, logarithmic=logarithmic)
    assert axis.low < axis.high and all(axis.low <= value <= axis.high for value in values)
    assert 1 <= len(axis.ticks) <= 6 and all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert [axis.share(value) for value in sorted(values)] == sorted(axis.share(value) for value in values)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4213, "0.421 s"), (12.0, "12 s"), (119.7, "2 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def printed(monkeypatch: pytest.MonkeyPatch, show_it: Callable[[], None]) -> str:
    written = StringIO()
    monkeypatch.setattr(show, "console", Console(file=written, width=200, highlight=False))
    show_it()
    return written.getvalue()


def test_the_command_line_names_fallbacks(plain: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(monkeypatch, lambda: show.print_report(plain))
    assert "fell back" not in text and "plain rounding" not in text
    report = with_errors(plain, lambda number: "saw [no] tokens" if number < 5 else None)
    text = printed(monkeypatch, lambda: show.print_report(report))
    mean = sum((10 + n) / (20 + n) for n in range(14)) / 14
    assert "5 layers fell back" in text and text.count("saw [no] tokens") == 3 and "and 2 more" in text
    assert f"error {mean:.3f} of plain rounding's, mean over 14 layers" in text


def test_a_plan_shows_its_units(calibrated: Report, plain: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "calibrated on" not in printed(monkeypatch, lambda: show.print_plan(plain.plan, 1, "cpu"))
    text = " ".join(printed(monkeypatch, lambda: show.print_plan(calibrated.plan, 1, "cpu")).split())
    assert "model.layers.* 2 7 smoothquant, then rtn" in text and "4 samples of 32 tokens, 8 at a time, seed 42" in text
    assert "which smoothquant rescales: it may be low, even below 0 dB, where nothing is lost" in text
    limited = replace(calibrated.plan, tokens=16)
    text = " ".join(printed(monkeypatch, lambda: show.print_plan(limited, 1, "cpu")).split())
    assert "4 samples of 16 tokens (the model takes no more), 8 at a time" in text
