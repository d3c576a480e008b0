"""GPT-2: its matrices are Conv1D, stored [in, out], and stay; head tied to the embedding."""

from __future__ import annotations

from roundel.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    name="GPT-2",
    blocks=("transformer.h", "h"),
    embedding="transformer.wte.weight",
    spaces=(),
    transposed=r"\bh\.\d+\.(attn|crossattention|mlp)\.(c_attn|q_attn|c_fc|c_proj)$",
)
