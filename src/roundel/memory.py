"""How much memory the machine has free, and this process has held."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

__all__ = ["forget_peak", "free_memory", "give_back", "peak_memory"]


def free_memory(device: str = "cpu") -> int:
    """Bytes that can be had without pushing others out, on a device as torch names it; 8 GiB where the system does not
    say."""
    if device != "cpu":
        import torch

        found: int = getattr(torch, torch.device(device).type).mem_get_info(device)[0]
        return found
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


def forget_peak() -> bool:
    """Have `peak_memory` count from now on; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def give_back() -> None:
    """Let the system have what was freed and the C library keeps for itself, where it can be asked to."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def _line(file: str, name: str) -> int | None:
    """The kibibytes that a line of a file of the kernel's gives."""
    try:
        lines = Path(file).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), None)
