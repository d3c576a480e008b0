"""Step-3.5-Flash: experts in three 3-D tensors under `moe.`, a gate on each head; blocks past the last are for MTP."""

from __future__ import annotations

from roundel.families.family import Family, FusedExperts, Keep
from roundel.families.generic import TOWER

__all__ = ["FAMILY"]

KEPT = (
    Keep(pattern=r"\.self_attn\.g_proj$", reason="attention gate: one row for each head"),
    Keep(pattern=r"^vit_large_projector$", reason=TOWER),
)

FAMILY = Family(
    name="Step-3.5",
    kept=KEPT,
    fused_experts=tuple(
        FusedExperts(tensor=rf"(?P<block>.+\.moe)\.{name}(\.weight)?", projections=(name,))
        for name in ("gate_proj", "up_proj", "down_proj")
    ),
    norm_offset=1.0,
)
