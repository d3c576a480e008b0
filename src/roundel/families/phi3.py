"""Phi-3 and Phi-4: laid out like Llama, but q, k, v are one matrix (qkv_proj), gate and up another (gate_up_proj)."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import llama

__all__ = ["FAMILY"]

FAMILY = replace(llama.FAMILY, name="Phi-3")
