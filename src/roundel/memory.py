"""How much memory the machine has free, and this process has held."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

__all__ = ["free_memory", "peak_memory"]


def free_memory() -> int:
    """Bytes that can be had without pushing others out; 8 GiB where the system does not say."""
    free = _line("/proc/meminfo", "MemAvailable:")
    return 8 << 30 if free is None else 1024 * free


def peak_memory() -> int:
    """The most bytes that this process has held so far.

    Linux counts what the parent held when it started this process into its usual number, so it is asked elsewhere.
    """
    high = _line("/proc/self/status", "VmHWM:")
    if high is not None:
        return 1024 * high
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _line(file: str, name: str) -> int | None:
    """The kibibytes that a line of a file of the kernel's gives."""
    try:
        lines = Path(file).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), None)
