"""The journal: a torn end is forgotten, another plan is refused, every row is there when it says so."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from roundel.errors import OutputError, PlanChanged
from roundel.io.journal import JOURNAL, Journal, read_journal

PLAN = {"source": "m", "recipe.scheme": "W4A16", "demoted": {}, "fingerprint": "f1"}


def row(number: int) -> dict[str, object]:
    return {"name": f"layers.{number}", "kind": "round", "sqnr": 20.0 + number}


def begun(folder: Path, rows: int = 3) -> bytes:
    journal = Journal(folder, PLAN)
    for number in range(rows):
        journal.commit([row(number)])
    journal.close()
    return (folder / JOURNAL).read_bytes()


def test_what_was_committed_is_found_again(tmp_path: Path) -> None:
    begun(tmp_path)
    assert read_journal(tmp_path) == (PLAN, [row(0), row(1), row(2)])
    again = Journal(tmp_path, PLAN)
    assert list(again.finished) == ["layers.0", "layers.1", "layers.2"]
    again.commit([row(3), row(4)])
    assert again.finished["layers.4"] == row(4)
    again.close()
    assert read_journal(tmp_path) == (PLAN, [row(n) for n in range(5)])
    assert os.listdir(tmp_path) == [JOURNAL]


def test_a_journal_cut_anywhere_holds_the_rows_before_the_cut(tmp_path: Path) -> None:
    whole = begun(tmp_path)
    for length in range(len(whole)):
        (tmp_path / JOURNAL).write_bytes(whole[:length])
        lines = whole[:length].count(b"\n")
        found = read_journal(tmp_path)
        assert found == ((PLAN, [row(n) for n in range(lines - 1)]) if lines else None)
    journal = Journal(tmp_path, PLAN)  # of all but the last byte
    journal.commit([row(9)])
    journal.close()
    assert read_journal(tmp_path) == (PLAN, [row(0), row(1), row(9)])


@pytest.mark.parametrize(
    "damage", [b"\0" * 40 + b"\n", b"\xff\xfe\n", b"[1]\n", b"12\n", b"{}\n", b'{"name": "x"}\n', b"9" * 5000 + b"\n"]
)
def test_a_damaged_row_ends_the_journal(damage: bytes, tmp_path: Path) -> None:
    whole = begun(tmp_path)
    (tmp_path / JOURNAL).write_bytes(whole + damage + json.dumps(row(7)).encode() + b"\n")
    journal = Journal(tmp_path, PLAN)
    assert list(journal.finished) == ["layers.0", "layers.1", "layers.2"]
    journal.close()
    assert (tmp_path / JOURNAL).read_bytes() == whole, "rewritten without the damage"


def test_no_journal_and_an_empty_one_begin_anew(tmp_path: Path) -> None:
    assert read_journal(tmp_path) is None
    (tmp_path / JOURNAL).touch()
    assert read_journal(tmp_path) is None
    assert begun(tmp_path, rows=0) == json.dumps(PLAN).encode() + b"\n"


def test_another_plan_is_refused_and_left_alone(tmp_path: Path) -> None:
    before = begun(tmp_path)
    other = PLAN | {"recipe.scheme": "W8A16", "recipe.bits": 3, "fingerprint": "f2"}
    with pytest.raises(PlanChanged) as found:
        Journal(tmp_path, other)
    assert found.value.fields == {"recipe.scheme": ("W4A16", "W8A16"), "recipe.bits": (None, 3)}
    message = str(found.value)
    assert str(tmp_path) in message and "recipe.scheme: begun with W4A16, now W8A16" in message
    assert "--overwrite" in message and "f2" not in message
    assert (tmp_path / JOURNAL).read_bytes() == before


def test_a_field_that_is_gone_differs_too(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(PlanChanged) as found:
        Journal(tmp_path, {k: v for k, v in PLAN.items() if k != "demoted"})
    assert found.value.fields == {"demoted": ({}, None)}


def test_a_fingerprint_alone_is_named(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(PlanChanged, match="fingerprint"):
        Journal(tmp_path, PLAN | {"fingerprint": "f2"})


def test_a_crash_while_it_is_rewritten_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = begun(tmp_path)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            Journal(tmp_path, PLAN)
    assert (tmp_path / JOURNAL).read_bytes() == before
    Journal(tmp_path, PLAN).close()
    assert os.listdir(tmp_path) == [JOURNAL]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, PLAN)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OutputError, match=r"No space left on device.*repeat the same command"):
        journal.commit([row(0)])
    assert not journal.finished
    journal.close()


def test_a_short_write_is_written_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, write = Journal(tmp_path, PLAN), os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, bytes(data)[:7]))
    journal.commit([row(0), row(1)])
    monkeypatch.undo()
    journal.close()
    assert read_journal(tmp_path) == (PLAN, [row(0), row(1)])
