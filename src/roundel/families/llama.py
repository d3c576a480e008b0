"""Llama 1-3: dense, untied or tied head."""

from __future__ import annotations

from roundel.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(name="Llama")
