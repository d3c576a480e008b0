"""GPT-OSS: experts fused, in MXFP4 on the Hub or in bf16; rows of gate and up alternate."""

from __future__ import annotations

from typing import Literal

from roundel.families.family import Family, FusedExperts
from roundel.families.generic import ATTENTION_INPUT, FEED_INPUT, VALUES

__all__ = ["FAMILY"]

PARTS: tuple[tuple[str, Literal["weight", "blocks", "scales", "bias"]], ...] = (
    ("", "weight"),
    ("_blocks", "blocks"),
    ("_scales", "scales"),
    ("_bias", "bias"),
)

# blocks are [experts, out, in / 32, 16], scales [experts, out, in / 32]; the bf16 weight is [experts, in, out].
FAMILY = Family(
    name="GPT-OSS",
    fused_experts=tuple(
        FusedExperts(
            tensor=rf"(?P<block>.+)\.experts\.{name}{suffix}",
            projections=projections,
            transposed=part == "weight",
            interleaved=len(projections) > 1,
            part=part,
        )
        for name, projections in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",)))
        for suffix, part in PARTS
    ),
    spaces=(ATTENTION_INPUT, VALUES, FEED_INPUT),  # an expert multiplies by up + 1, clamped: up's channels are fixed
)
