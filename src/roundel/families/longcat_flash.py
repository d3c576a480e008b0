"""LongCat-Flash: two attentions and two MLPs in a block; the router is mlp.router.classifier; `model.mtp.` stays."""

from __future__ import annotations

from roundel.families.family import Family
from roundel.families.generic import FUSED_EXPERTS

__all__ = ["FAMILY"]

FAMILY = Family(name="LongCat-Flash", fused_experts=FUSED_EXPERTS)
