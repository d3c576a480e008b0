"""What is done becomes lasting in the background: files are flushed, then the journal has its lines."""

from __future__ import annotations

import threading

from roundel.io.journal import Journal
from roundel.io.safetensors import Shard
from roundel.report import Row

__all__ = ["FLUSH_BYTES", "Committer"]

FLUSH_BYTES = 32 << 20  # flushed and journaled at least this often, or after FLUSH_SECONDS
FLUSH_SECONDS = 1.0


class Committer:
    """Flushes files and journals finished rows, in its own thread, so that workers never wait for the disk."""

    def __init__(self, journal: Journal, shards: tuple[Shard, ...]) -> None:
        self._journal, self._shards = journal, shards
        self._rows: list[dict[str, object]] = []
        self._nbytes = 0
        self._wake = threading.Condition()
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="committer", daemon=True)
        self._thread.start()

    def add(self, row: Row) -> None:
        with self._wake:
            if self._error is not None:
                raise self._error
            self._rows.append(row.to_dict())
            self._nbytes += sum(row.nbytes)
            if self._nbytes >= FLUSH_BYTES:
                self._wake.notify()

    def close(self) -> None:
        """Commit what is left. Raises what the thread met."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _serve(self) -> None:
        closing = False
        while not closing:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._nbytes >= FLUSH_BYTES, timeout=FLUSH_SECONDS)
                closing, rows = self._closing, self._rows
                self._rows, self._nbytes = [], 0
            if rows:
                try:
                    for shard in self._shards:
                        shard.flush()
                    self._journal.commit(rows)
                except BaseException as error:
                    self._error = error
                    return
