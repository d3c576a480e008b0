"""Cohere's Command-R: attention and MLP side by side behind one norm; head tied to the embedding."""

from __future__ import annotations

from roundel.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(name="Cohere")
