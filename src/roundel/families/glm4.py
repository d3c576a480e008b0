"""GLM-4, dense: laid out like Llama, with gate and up fused in one 2-D matrix (mlp.gate_up_proj)."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import llama

__all__ = ["FAMILY"]

FAMILY = replace(llama.FAMILY, name="GLM-4")
