"""Qwen2.5-VL: names as in Qwen2-VL."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import qwen2_vl

__all__ = ["FAMILY"]

FAMILY = replace(qwen2_vl.FAMILY, name="Qwen2.5-VL")
