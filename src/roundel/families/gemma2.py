"""Gemma 2: laid out like Llama, head tied to the embedding, four norms in a block."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import gemma

__all__ = ["FAMILY"]

FAMILY = replace(gemma.FAMILY, name="Gemma 2")
