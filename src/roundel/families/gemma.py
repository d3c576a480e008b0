"""Gemma 1: laid out like Llama, head tied to the embedding; norms scale by 1 + weight."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import llama

__all__ = ["FAMILY"]

FAMILY = replace(llama.FAMILY, name="Gemma", norm_offset=1.0)
