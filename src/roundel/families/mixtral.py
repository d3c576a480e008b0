"""Mixtral: a router (block_sparse_moe.gate) and experts with w1 (gate), w2 (down), w3 (up)."""

from __future__ import annotations

from roundel.families.family import Family
from roundel.families.generic import FUSED_EXPERTS

__all__ = ["FAMILY"]

FAMILY = Family(name="Mixtral", fused_experts=FUSED_EXPERTS)
