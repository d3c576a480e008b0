"""The text model of Qwen3.5 and Qwen3.6, dense: linear attention as in Qwen3-Next."""

from __future__ import annotations

from roundel.families.family import Family
from roundel.families.qwen3_next import DECAY_GATES

__all__ = ["FAMILY"]

FAMILY = Family(
    name="Qwen3.5, text",
    kept=(DECAY_GATES,),
    blocks=("model.layers", "model.language_model.layers"),
    norm_offset=1.0,
)
