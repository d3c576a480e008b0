"""Ctrl-C while a plan is carried out: nothing that is nearly done is thrown away."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

__all__ = ["Interruption"]

SAID = b"\nStopping at the end of the work at hand. Press Ctrl-C again to stop at once.\n"


class Interruption:
    """While it is entered, the first SIGINT sets `asked`, and the next one raises KeyboardInterrupt.

    Only where SIGINT would raise KeyboardInterrupt: in the main thread, and unless the program handles it otherwise.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._before: object = None

    def __enter__(self) -> Interruption:
        is_ours = threading.current_thread() is threading.main_thread()
        if is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop_if_asked(self) -> None:
        """Raises KeyboardInterrupt."""
        if self.asked.is_set():
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.stop_if_asked()
        self.asked.set()
        os.write(2, SAID)  # print is not safe here: the signal may have come in the middle of one
