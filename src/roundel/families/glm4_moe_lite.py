"""GLM-4.7-Flash: DeepSeek-V3's layout; the dense MLPs of the first blocks stay."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import deepseek_v3
from roundel.families.family import Keep

__all__ = ["DENSE_MLP", "FAMILY"]

DENSE_MLP = Keep(
    pattern=r"\.mlp\.(gate_proj|up_proj|down_proj)$",
    reason="dense MLP of the first blocks: vLLM does not load it rounded",
)

FAMILY = replace(deepseek_v3.FAMILY, name="GLM-4 MoE Lite", kept=(DENSE_MLP,))
