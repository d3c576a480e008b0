"""Command-R7B and Command A: laid out like Command-R; most blocks attend to a window."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import cohere

__all__ = ["FAMILY"]

FAMILY = replace(cohere.FAMILY, name="Cohere 2")
