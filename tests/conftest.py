"""What every test may rely on, however the tests were started."""

from __future__ import annotations

import os
import signal
import sys

import pytest

# Matrices in tests are too small for threads, which only wait for each other on a busy machine. Read when torch is
# first imported, here and in children.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts something in the background has it ignore Ctrl-C; children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _drawn_alike() -> None:
    """What a test draws without a seed of its own is the same whatever ran before it."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
