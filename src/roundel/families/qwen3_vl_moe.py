"""Qwen3-VL with experts: named as Qwen3-VL. Its 3-D expert tensors are stored [experts, in, out], unlike Qwen3.5's."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import qwen3_vl
from roundel.families.generic import FUSED_EXPERTS

__all__ = ["FAMILY"]

FAMILY = replace(
    qwen3_vl.FAMILY,
    name="Qwen3-VL MoE",
    fused_experts=tuple(replace(rule, transposed=True) for rule in FUSED_EXPERTS),
)
