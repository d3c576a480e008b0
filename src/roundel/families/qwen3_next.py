"""Qwen3-Next: experts as in Qwen2-MoE; three of four blocks have linear attention, which keeps its two gates."""

from __future__ import annotations

from roundel.families.family import Family, Keep
from roundel.families.generic import FUSED_EXPERTS

__all__ = ["DECAY_GATES", "FAMILY"]

DECAY_GATES = Keep(
    # Qwen3-Next's own FP8 checkpoint leaves in_proj_ba in bf16 too: two rows for each head.
    pattern=r"\.linear_attn\.in_proj_(ba|b|a)$",
    reason="decay gate of the linear attention: too few rows, too sensitive",
)

FAMILY = Family(name="Qwen3-Next", kept=(DECAY_GATES,), fused_experts=FUSED_EXPERTS, norm_offset=1.0)
