"""Qwen4-Exp (Qwen3.8-Flash-Next): Qwen3.5's layout with hyper-connections, an indexer and n-gram embeddings."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import qwen3_5_moe
from roundel.families.family import Keep

__all__ = ["FAMILY"]

KEPT = (
    Keep(
        pattern=r"hyper_connection(_mixer)?\.",
        reason="hyper-connection: mixes residual streams, too sensitive to round",
    ),
    Keep(pattern=r"\.ple\.", reason="n-gram embedding and its projections"),
    Keep(pattern=r"\.indexer\.", reason="indexer of the sparse attention: chooses tokens, too small to gain from"),
    Keep(pattern=r"\.shared_expert\.", reason="shared expert: seen by every token"),
)

FAMILY = replace(qwen3_5_moe.FAMILY, name="Qwen4-Exp", kept=(*qwen3_5_moe.FAMILY.kept, *KEPT))
