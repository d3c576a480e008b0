"""Numbers in, numbers out. The torch text is the definition; `ops/numba` holds faster spellings of the same results.

A kernel may be faster, never different: every one is tested bit for bit against its definition. `ROUNDEL_REFERENCE=1`
forces the definitions.
"""

from __future__ import annotations

import os

__all__ = ["use_kernels"]


def use_kernels() -> bool:
    """Whether the faster spellings may be used: unless ROUNDEL_REFERENCE=1."""
    return os.environ.get("ROUNDEL_REFERENCE", "") in ("", "0")
