"""Qwen3, dense: laid out like Llama, with norms on q and k."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import llama

__all__ = ["FAMILY"]

FAMILY = replace(llama.FAMILY, name="Qwen3")
