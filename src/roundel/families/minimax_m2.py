"""MiniMax-M2: named as Mixtral, published in FP8 blocks; a 1-D e_score_correction_bias beside the router."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import mixtral

__all__ = ["FAMILY"]

FAMILY = replace(mixtral.FAMILY, name="MiniMax-M2")
