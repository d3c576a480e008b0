"""Commands in processes of their own, with the most memory that they held; and a model that is large enough to tell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["SHAPE", "run", "where_peaks_are_told"]

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
PROGRAM = """
import sys
from roundel.cli.main import cli
cli(sys.argv[1:], standalone_mode=False)
status = open("/proc/self/status").read()
print("peak", int(status.partition("VmHWM:")[2].split()[0]) * 1024)
"""


where_peaks_are_told = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, which is Linux's"
)


def run(*arguments: str) -> str:
    """What a command of roundel prints, and a last line: `peak`, bytes."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True
    ).stdout
