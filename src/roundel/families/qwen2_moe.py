"""Qwen1.5-MoE and Qwen2-MoE: a router (mlp.gate), experts, and a shared expert with a gate of one row."""

from __future__ import annotations

from roundel.families.family import Family
from roundel.families.generic import FUSED_EXPERTS

__all__ = ["FAMILY"]

FAMILY = Family(name="Qwen2-MoE", fused_experts=FUSED_EXPERTS)
