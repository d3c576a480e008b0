"""GLM-5.3-Flash, multimodal: linear and sparse attention under hyper-connections, experts as in GLM-5."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import glm_moe_dsa, qwen3_vl
from roundel.families.family import Keep
from roundel.families.glm4_moe_lite import DENSE_MLP
from roundel.families.glm_moe_dsa import INDEXER

__all__ = ["FAMILY"]

KEPT = (
    DENSE_MLP,
    INDEXER,
    Keep(
        pattern=r"\.self_attn\.",
        reason="attention, linear or sparse: kept, as no measurement says that it may be rounded",
    ),
)

FAMILY = replace(
    glm_moe_dsa.FAMILY, name="GLM-5 Next", kept=KEPT, blocks=qwen3_vl.FAMILY.blocks, embedding=qwen3_vl.FAMILY.embedding
)
