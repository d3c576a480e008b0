"""DeepSeek-V3.2: as V3, with an indexer that chooses the tokens attended to."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import deepseek_v3
from roundel.families.family import Keep

__all__ = ["FAMILY"]

INDEXER_WEIGHTS = Keep(
    # transformers keeps it in float32 (`_keep_in_fp32_modules`).
    pattern=r"\.indexer\.weights_proj$",
    reason="head weights of the indexer: one row for each head",
)

FAMILY = replace(deepseek_v3.FAMILY, name="DeepSeek-V3.2", kept=(INDEXER_WEIGHTS,))
