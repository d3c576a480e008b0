"""What is done, for which plan: a file of JSON lines beside the output while it is unfinished.

Line 1 names the plan; each further line is one finished piece of work, written only after its bytes are safe. A last
line that a crash cut short is ignored: that work is done again, to the same offsets.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from roundel.errors import OutputError, PlanChanged

__all__ = ["JOURNAL", "Journal", "alone", "read_journal"]

JOURNAL = "journal.jsonl"


def read_journal(folder: Path) -> tuple[dict[str, object], list[dict[str, object]]] | None:
    """(the plan's identity, finished rows) of an unfinished output; None when there is no journal worth continuing."""
    path = folder / JOURNAL
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}. Choose a folder you may write to.") from error
    rows: list[dict[str, object]] = []
    for line in lines:
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or (rows and not {"name", "kind"} <= row.keys()):
            break
        rows.append(row)
    return (rows[0], rows[1:]) if rows else None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder so that no second run writes to it. Raises OutputError when one does already.

    The hold ends with the process, however it ends; where the system knows no file locks there is none.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield  # what may not even be opened is refused, by name, before anything is written to it
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"Another run is writing to {folder}. Wait until it has ended, or choose another output folder."
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


class Journal:
    """Open for adding. `finished` holds the rows of work that is already safe, by name.

    Raises PlanChanged when the folder holds an unfinished run of another plan.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object]) -> None:
        found = read_journal(folder)
        self.finished: dict[str, dict[str, object]] = {}
        if found is not None:
            begun, rows = found
            differing = {
                k: (begun.get(k), identity.get(k)) for k in {**begun, **identity} if begun.get(k) != identity.get(k)
            }
            if len(differing) > 1:
                differing.pop("fingerprint", None)  # it follows from the others
            if differing:
                raise PlanChanged(str(folder), differing)
            self.finished = {str(row["name"]): row for row in rows}
        self.path = folder / JOURNAL
        try:
            whole = [dict(identity), *self.finished.values()]
            self._rewrite("".join(json.dumps(row) + "\n" for row in whole))
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror}. Free the disk or choose another output folder."
            ) from error

    def commit(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Add finished work. Call only after its bytes are flushed."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        try:
            left = text.encode()
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror}. Free the disk and repeat the same command to "
                f"continue."
            ) from error
        for line in text.splitlines():
            row = json.loads(line)
            self.finished[str(row["name"])] = row

    def close(self) -> None:
        os.close(self._file)

    def _rewrite(self, text: str) -> None:
        """Replace the file whole, so that a torn last line is gone before anything follows it."""
        fresh = self.path.with_suffix(".new")
        with fresh.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)
