"""Kimi K2: DeepSeek-V3 with more experts."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import deepseek_v3

__all__ = ["FAMILY"]

FAMILY = replace(deepseek_v3.FAMILY, name="Kimi K2")
