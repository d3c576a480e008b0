"""The text model of Llama 4: 3-D experts stored [experts, in, out], a router, a shared expert."""

from __future__ import annotations

from dataclasses import replace

from roundel.families.family import Family
from roundel.families.generic import FUSED_EXPERTS

__all__ = ["FAMILY"]

FAMILY = Family(
    name="Llama 4, text",
    fused_experts=tuple(replace(rule, transposed=True) for rule in FUSED_EXPERTS),
)
