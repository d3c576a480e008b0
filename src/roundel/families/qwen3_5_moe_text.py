"""The text model of Qwen3.5 and Qwen3.6 with experts: the dense one's attention, Qwen2-MoE's experts."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import qwen3_5_text
from roundel.families.generic import FUSED_EXPERTS

__all__ = ["FAMILY"]

FAMILY = replace(qwen3_5_text.FAMILY, name="Qwen3.5 MoE, text", fused_experts=FUSED_EXPERTS)
