"""Qwen3.5 and Qwen3.6, dense: named as Qwen3-VL, with the linear attention of Qwen3-Next and an `mtp.` block."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import qwen3_vl
from roundel.families.qwen3_next import DECAY_GATES

__all__ = ["FAMILY"]

FAMILY = replace(qwen3_vl.FAMILY, name="Qwen3.5", kept=(DECAY_GATES,), norm_offset=1.0)
