"""GLM-5: DeepSeek-V3.2's layout; the indexer and the dense MLPs of the first blocks stay."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import deepseek_v3
from roundel.families.family import Keep
from roundel.families.glm4_moe_lite import DENSE_MLP

__all__ = ["FAMILY", "INDEXER"]

INDEXER = Keep(
    pattern=r"\.indexer\.",
    reason="indexer of the sparse attention: chooses tokens, too small to gain from",
)

FAMILY = replace(deepseek_v3.FAMILY, name="GLM-5", kept=(DENSE_MLP, INDEXER))
