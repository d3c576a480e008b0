"""How kernels are compiled: kept on disk, run without the interpreter's lock, by the processor's rules for floats."""

from __future__ import annotations

from typing import Any

import numba

__all__ = ["SETTINGS", "jit", "summing"]

SETTINGS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy", "boundscheck": False}
jit = numba.njit(**SETTINGS)
# Sums may be taken in any order; what is summed up is finite.
summing = numba.njit(**SETTINGS, fastmath={"reassoc", "nsz", "contract", "nnan"})
