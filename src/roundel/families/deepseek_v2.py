"""DeepSeek-V2: latent attention, all of whose projections are linear layers; experts from the second block on."""

from __future__ import annotations

from roundel.families.family import Family
from roundel.families.generic import FUSED_EXPERTS

__all__ = ["FAMILY"]

FAMILY = Family(name="DeepSeek-V2", fused_experts=FUSED_EXPERTS)
