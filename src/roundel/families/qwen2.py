"""Qwen1.5 to Qwen2.5, dense: laid out like Llama, with biases on q, k and v."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import llama

__all__ = ["FAMILY"]

FAMILY = replace(llama.FAMILY, name="Qwen2")
