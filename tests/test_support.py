"""The support matrix: every cell is loaded by a consumer, or says why not; and `roundel list formats` shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import command
from peers.consumer_cases import CASES, CONSUMERS, ELSEWHERE, LOADED, WRITTEN, cell_of, cells
from roundel import support
from roundel.formats import FORMATS
from roundel.support import NOT_LOADED, support_rows

PEERS = Path(__file__).parent / "peers"


def test_every_written_format_has_a_consumer() -> None:
    written = {format.name for format in FORMATS.values() if format.writes}
    assert written == {*CONSUMERS, *ELSEWHERE}
    assert not set(CONSUMERS) & set(ELSEWHERE)
    assert all((PEERS / name).exists() for name in ELSEWHERE.values())


def test_every_cell_is_loaded_or_says_why_not() -> None:
    loaded = {cell_of(case) for case in LOADED}
    assert [cell for cell in cells() if cell not in loaded and cell not in NOT_LOADED] == []


def test_reasons_belong_to_cells_that_nothing_loads() -> None:
    stored = {(name, scheme) for scheme, formats in support_rows() for name, why in formats.items() if why is None}
    assert set(NOT_LOADED) <= stored
    assert not set(NOT_LOADED) & {cell_of(case) for case in WRITTEN}
    assert all(NOT_LOADED.values())


def test_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_a_cell_that_is_not_loaded_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "NOT_LOADED", {("fp8", "FP8_BLOCK"): "there is no such runtime"})
    shown = command("list", "formats").output
    assert "(yes) fp8, FP8_BLOCK: stored and read back" in shown
    assert "there is no such runtime" in shown
    assert command("list", "formats", "--markdown").output.count("(yes)") == 1
