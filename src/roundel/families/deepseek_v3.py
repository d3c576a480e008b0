"""DeepSeek-V3 and R1: as V2, published in FP8 blocks; block num_hidden_layers is for multi-token prediction."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import deepseek_v2

__all__ = ["FAMILY"]

FAMILY = replace(deepseek_v2.FAMILY, name="DeepSeek-V3")
