"""Qwen3.5 and Qwen3.6 with experts: as Qwen3.5, experts stored fused, [experts, out, in]."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import qwen3_5
from roundel.families.generic import FUSED_EXPERTS

__all__ = ["FAMILY"]

FAMILY = replace(qwen3_5.FAMILY, name="Qwen3.5 MoE", fused_experts=FUSED_EXPERTS)
