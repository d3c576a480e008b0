"""Qwen3 with experts: laid out like Qwen2-MoE, without a shared expert."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import qwen2_moe

__all__ = ["FAMILY"]

FAMILY = replace(qwen2_moe.FAMILY, name="Qwen3-MoE")
