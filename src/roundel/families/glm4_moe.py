"""GLM-4.5 to 4.7: Llama's attention, DeepSeek-V3's experts; block num_hidden_layers is for multi-token prediction."""

from __future__ import annotations

from roundel.families.family import Family
from roundel.families.generic import FUSED_EXPERTS

__all__ = ["FAMILY"]

FAMILY = Family(name="GLM-4 MoE", fused_experts=FUSED_EXPERTS)
