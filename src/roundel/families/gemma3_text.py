"""Gemma 3 without a vision tower: laid out like Gemma 2."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import gemma2

__all__ = ["FAMILY"]

FAMILY = replace(gemma2.FAMILY, name="Gemma 3")
